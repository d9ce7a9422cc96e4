// How many threads an op may use. A process forked from one with several threads has to work alone: torch's parallel
// regions and ours start libgomp's worker threads, a fork does not copy them, and a child that opens a parallel region
// waits forever for workers that it does not have.
#pragma once

namespace sparsenet::cpu {

// `wanted` (what torch says), but 1 in such a child.
int usable_threads(int wanted);

} // namespace sparsenet::cpu
