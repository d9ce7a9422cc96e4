// The block sizes that exist, on every device: kernels are compiled for these and patterns of others are refused.
#pragma once

namespace sparsenet {

constexpr int kBlockSizes[] = {1, 4, 8, 16, 32, 64, 128}; // ascending
constexpr int kNumBlockSizes = sizeof(kBlockSizes) / sizeof(kBlockSizes[0]);

} // namespace sparsenet
