// Clusters: CLUSTER_BLOCKS neighbouring blocks along x that run at the same time and reach each other's shared memory;
// a single block on GPUs that know no clusters.
//
// A thread arrives, and later waits until all threads of all blocks have arrived. It then sees what they wrote before.
#pragma once
#include "types.cuh"

#ifndef CLUSTER_BLOCKS
#define CLUSTER_BLOCKS 1
#endif
#if CLUSTER_BLOCKS > 1

#define CLUSTER __cluster_dims__(CLUSTER_BLOCKS, 1, 1)
DEVICE void cluster_arrive() { __cluster_barrier_arrive(); }
// The first arrival, which only says that the block has started: nothing has been written that others would have to
// see.
DEVICE void cluster_start() { __cluster_barrier_arrive_relaxed(); }
DEVICE void cluster_wait() { __cluster_barrier_wait(); }
// The address of the same shared memory in another block of the cluster, whose place there is `rank`.
template <class T>
DEVICE T* of_block(T* shared, int rank) {
    return static_cast<T*>(__cluster_map_shared_rank(shared, (unsigned)rank));
}

#else

#define CLUSTER
DEVICE void cluster_arrive() {}
DEVICE void cluster_start() {}
DEVICE void cluster_wait() {}
template <class T>
DEVICE T* of_block(T* shared, int) {
    return shared;
}

#endif

// The place of this block in its cluster, from 0 on.
DEVICE int cluster_rank() { return blockIdx.x % CLUSTER_BLOCKS; }

// Writes a value to the same place in the shared memory of all blocks of the cluster. They have started by then, and
// see it once they have waited again.
template <class T>
DEVICE void give_all(T& place, const T& value) {
#pragma unroll
    for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) *of_block(&place, rank) = value;
}

// Makes each of K values, which all threads of a block know, its sum over the blocks of the cluster. All threads call
// it and get the same bits, once in a kernel for each K; all blocks have started by then.
template <int K>
DEVICE void cluster_sum(double (&values)[K]) {
    if (CLUSTER_BLOCKS == 1) return;
    __shared__ double of_blocks[CLUSTER_BLOCKS][K];
    if (threadIdx.x == 0)
#pragma unroll
        for (int k = 0; k < K; k++) give_all(of_blocks[cluster_rank()][k], values[k]);
    cluster_arrive();
    cluster_wait();
#pragma unroll
    for (int k = 0; k < K; k++) {
        values[k] = 0;
#pragma unroll
        for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) values[k] += of_blocks[rank][k];
    }
}
