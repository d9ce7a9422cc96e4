"""An embedding of networks: an encoder-decoder whose latent space is searched for weights and architecture together."""

from sparsenet.architecture.embedding.autoencoder import (
    AutoencoderConfig,
    NetworkAutoencoder,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)
from sparsenet.architecture.embedding.codec import NetworkBatch, NetworkSpace
from sparsenet.architecture.embedding.network_file import load_network, save_network
from sparsenet.architecture.embedding.search import (
    EmbeddingSearchConfig,
    RegressionData,
    SearchOutcome,
    search_embedding,
)

__all__ = [
    "AutoencoderConfig",
    "EmbeddingSearchConfig",
    "NetworkAutoencoder",
    "NetworkBatch",
    "NetworkSpace",
    "RegressionData",
    "SearchOutcome",
    "load_autoencoder",
    "load_network",
    "save_autoencoder",
    "save_network",
    "search_embedding",
    "train_autoencoder",
]
