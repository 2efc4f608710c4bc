// Channels last, [M, C], a tile of columns on chip: which packs a thread keeps, and sums down the tile.
//
// Here C is a multiple of WIDTH. Cluster t takes `tile` columns of packs, a power of two; its blocks take rows_per_block rows
// each. The threads of a block stand in rows of `tile`, and go down the rows in strides.
#pragma once
#include "../cluster.cuh"
#include "../staging.cuh"
#include "columns.cuh"

constexpr int SUMMANDS = 8;  // that a thread adds in float32 before the sum goes on in float64

struct Tile {
    index_t C, first;   // the first channel of the tile
    int tile, tx, step; // the threads' rows, this thread's place in one, and how many there are
    int lanes;          // channels of the tile
    int begin, end;     // this thread's rows

    DEVICE Tile(index_t M, index_t C, int tile, int rows_per_block)
        : C(C), first(blockIdx.x / CLUSTER_BLOCKS * (index_t)tile * WIDTH), tile(tile), tx(threadIdx.x % tile),
          step(THREADS / tile), lanes((int)min((index_t)tile * WIDTH, C - first)) {
        begin = cluster_rank() * rows_per_block + threadIdx.x / tile;
        end = tx * WIDTH < lanes ? min((cluster_rank() + 1) * rows_per_block, (int)M) : 0;
    }
    DEVICE index_t at(int row) const { return row * C + first + tx * WIDTH; }
    // Of the pack of a row in the block's shared memory.
    DEVICE int place(int row) const { return threadIdx.x + (row - begin) * tile; }
    DEVICE int count() const { return max(0, (end - begin + step - 1) / step); }
};

// Starts the copies of a thread's packs to their places.
DEVICE void stage(raw_t* shared, const data_t* p, const Tile& tile) {
    for (int row = tile.begin; row < tile.end; row += tile.step) stage(shared + tile.place(row), p + tile.at(row));
}

// The sums of each of K values per element over the threads of the cluster that have the element's channel, for thread q
// that of channel q of the tile, in all blocks. All threads call it; at its first call, threads have arrived.
template <int K>
DEVICE void sum_tile(const Tile& tile, double (&values)[K][WIDTH], double (&sums)[K]) {
    __shared__ double of_warps[K][THREADS / 32][MOST_LANES], of_blocks[CLUSTER_BLOCKS][K][MOST_LANES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            for (int distance = 16; distance >= tile.tile; distance /= 2)
                values[k][e] += __shfl_xor_sync(ALL_LANES, values[k][e], distance);
            if (lane < tile.tile) of_warps[k][warp][lane * WIDTH + e] = values[k][e];
        }
    __syncthreads();
    cluster_wait();
    if (q < tile.lanes)
#pragma unroll
        for (int k = 0; k < K; k++) {
            double sum = 0;
            for (int w = 0; w < THREADS / 32; w++) sum += of_warps[k][w][q];
            give_all(of_blocks[cluster_rank()][k][q], sum);
        }
    cluster_arrive();
    cluster_wait();
    if (q < tile.lanes)
#pragma unroll
        for (int k = 0; k < K; k++) {
            sums[k] = 0;
#pragma unroll
            for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) sums[k] += of_blocks[rank][k][q];
        }
}

// The same for moments, whose count is that of the thread's rows.
DEVICE Moments merge_tile(const Tile& tile, double (&mean)[WIDTH], double (&m2)[WIDTH]) {
    __shared__ Moments of_warps[THREADS / 32][MOST_LANES], of_blocks[CLUSTER_BLOCKS][MOST_LANES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = threadIdx.x;
    double count = tile.count();
    for (int distance = 16; distance >= tile.tile; distance /= 2) {
        const double others = __shfl_xor_sync(ALL_LANES, count, distance);
        const double share = count + others > 0 ? others / (count + others) : 0;  // one division for all elements
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            const Moments other = {others, __shfl_xor_sync(ALL_LANES, mean[e], distance),
                                   __shfl_xor_sync(ALL_LANES, m2[e], distance)};
            const Moments both = merge({count, mean[e], m2[e]}, other, share);
            mean[e] = both.mean;
            m2[e] = both.m2;
        }
        count += others;
    }
    if (lane < tile.tile)
#pragma unroll
        for (int e = 0; e < WIDTH; e++) of_warps[warp][lane * WIDTH + e] = {count, mean[e], m2[e]};
    __syncthreads();
    cluster_wait();
    if (q < tile.lanes)
        give_all(of_blocks[cluster_rank()][q],
                 merge_all<THREADS / 32>([&](int w) -> const Moments& { return of_warps[w][q]; }));
    cluster_arrive();
    cluster_wait();
    if (q >= tile.lanes) return {0, 0, 0};
    return merge_all<CLUSTER_BLOCKS>([&](int rank) -> const Moments& { return of_blocks[rank][q]; });
}
