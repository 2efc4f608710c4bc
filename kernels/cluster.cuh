// Clusters: CLUSTER_BLOCKS neighbouring blocks that run at the same time and reach each other's shared memory.
//
// A cluster is CLUSTER_BLOCKS blocks along x, 1 on GPUs that know no clusters. A block that has arrived and waits knows
// that all threads of all blocks have arrived, and sees what they wrote before.
#pragma once
#include "types.cuh"

#if CLUSTER_BLOCKS > 1

#define CLUSTER __cluster_dims__(CLUSTER_BLOCKS, 1, 1)
DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
DEVICE void cluster_wait() { __cluster_barrier_wait(); }
template <class T>
DEVICE T* of_block(T* shared, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(shared, (unsigned)rank));
}

#else

#define CLUSTER
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
template <class T>
DEVICE T* of_block(T* shared, int) {
    return shared;
}

#endif

// The place of this block in its cluster.
DEVICE int cluster_rank() { return blockIdx.x % CLUSTER_BLOCKS; }

// Gives all blocks of the cluster a value, at the same place in their shared memory. They have started by then, and see it
// once they have waited again.
template <class T>
DEVICE void give_all(T& place, const T& value) {
#pragma unroll
    for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) *of_block(&place, rank) = value;
}
