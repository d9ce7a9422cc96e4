"""What a block, or a weight, is worth: estimates of how the loss changes when it goes, from cheap to expensive.

All of them are sums over the rows of a layer's input and of the gradient of its output, so none needs a gradient per
example, and none is ever as large as the dense weight. Rows are examples; where the input has more dimensions (places
of a sequence), rows of one example count as independent, which leaves out the products of their gradients. The
gradients are taken as those of a loss that is a mean over the rows; any other constant in front of it changes all
saliencies of a layer alike.
"""

from sparsenet.saliency.fisher import block_fisher, diagonal_fisher, first_order, obd_saliency
from sparsenet.saliency.flow import synaptic_flow
from sparsenet.saliency.measuring import Batches, Call, LastCall, sampled_loss, show_backward_passes
from sparsenet.saliency.second_order import batch_derivatives
from sparsenet.saliency.shortlist import rerank
from sparsenet.saliency.woodfisher import woodfisher_saliency, woodfisher_update

__all__ = [
    "Batches",
    "Call",
    "LastCall",
    "batch_derivatives",
    "block_fisher",
    "diagonal_fisher",
    "first_order",
    "obd_saliency",
    "rerank",
    "sampled_loss",
    "show_backward_passes",
    "synaptic_flow",
    "woodfisher_saliency",
    "woodfisher_update",
]
