"""Numbers that Srinivas and Babu published (Learning Neural Network Architectures using Backpropagation, BMVC 2016)."""

__all__ = ["PUBLISHED", "PUBLISHED_CLASSES", "PUBLISHED_DEPTHS", "PUBLISHED_SVD"]

# Learnt architecture, its accuracy, and that of the same network trained directly
PUBLISHED = {
    "AL1": ("16-26-10", 99.07, 99.08, "15.0K"),
    "AL2": ("20-50-20-10", 99.07, 99.14, "40.9K"),
    "AL3": ("16-40-10", 99.22, 99.25, "22.9K"),
    "AL4": ("20-50-70-10", 99.19, 99.21, "82.3K"),
}
# Rank of the truncated SVD: parameters, accuracy
PUBLISHED_SVD = {10: ("43.6K", 98.47), 40: ("83.1K", 99.06)}
# Classes: learnt neurons
PUBLISHED_CLASSES = {2: 2, 3: 6, 4: 6, 5: 8, 6: 11, 7: 13, 8: 16, 9: 15, 10: 16}
# Initial depth: final depth
PUBLISHED_DEPTHS = {6: 5, 8: 6, 10: 6, 12: 6, 15: 8}
