// compact_blocks on the CPU: rows and columns of a block-sparse matrix gathered into another pattern.
#pragma once

#include "../types.h"

namespace sparsenet::cpu {

// Throws std::invalid_argument when rows or cols do not fit the patterns, or the block sizes differ.
void compact_blocks(const CompactBlocks& op, int threads);

} // namespace sparsenet::cpu
