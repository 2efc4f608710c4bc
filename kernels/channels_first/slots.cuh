// Channels first, [N, C, L], a channel on chip: which slots of a channel a thread keeps.
//
// A row has slots_per_row slots, of which the last one may be empty: rows begin anywhere in a pack. Slot v of a channel is
// slot v % slots_per_row of its row v / slots_per_row. The channel's slots are dealt out to the blocks of a cluster, each of
// which takes slots_per_block in a row, and goes through them in strides of its threads.
#pragma once
#include "../cluster.cuh"
#include "../staging.cuh"
#include "rows.cuh"

class Slots {
    index_t row, L, pitch;          // the first element of the row; from row to row
    int j, slots_per_row;           // the slot of the row
    int step_rows, step_slots;      // from slot to slot of the thread
    int v, end;                     // within the block

  public:
    DEVICE Slots(index_t N, index_t C, index_t L, int slots_per_row, int slots_per_block)
        : L(L), pitch(C * L), slots_per_row(slots_per_row), step_rows(THREADS / slots_per_row),
          step_slots(THREADS % slots_per_row), v(threadIdx.x) {
        const int begin = cluster_rank() * slots_per_block, n = (begin + v) / slots_per_row;
        end = min(slots_per_block, (int)N * slots_per_row - begin);
        j = begin + v - n * slots_per_row;
        row = (n * C + channel()) * L;
    }
    DEVICE static index_t channel() { return blockIdx.x / CLUSTER_BLOCKS; }
    DEVICE bool more() const { return v < end; }
    DEVICE int place() const { return v; }  // in the block's shared memory
    DEVICE Slot slot() const {
        const index_t at = row - row % WIDTH + (index_t)j * WIDTH, left = row + L - at;
        if (left <= 0) return {0, 0, 0};
        return {at, (int)max(row - at, (index_t)0), (int)min(left, (index_t)WIDTH)};
    }
    DEVICE void next() {
        v += THREADS;
        j += step_slots;
        row += step_rows * pitch;
        if (j >= slots_per_row) {
            j -= slots_per_row;
            row += pitch;
        }
    }
};

// Starts the copies of a thread's slots to their places; see `load` for what is readable.
DEVICE void stage(raw_t* shared, const data_t* p, Slots slots, index_t readable) {
    for (; slots.more(); slots.next()) {
        const Slot slot = slots.slot();
        if (slot.empty()) continue;
        if (slot.whole() || slot.at + WIDTH <= readable)
            stage(shared + slots.place(), p + slot.at);
        else
            shared[slots.place()] = load_elements(p + slot.at, slot.lo, slot.hi);
    }
}

// The moments of all blocks of the cluster together, from those of each, which all its threads know. All threads call it;
// thread 0 of each block gets the same bits. At its first call, threads have arrived.
DEVICE Moments cluster_merge(const Moments& own) {
    if (CLUSTER_BLOCKS == 1) return own;
    __shared__ Moments of_blocks[CLUSTER_BLOCKS];
    cluster_wait();  // all blocks have started
    if (threadIdx.x == 0) give_all(of_blocks[cluster_rank()], own);
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x > 0) return own;
    return merge_all<CLUSTER_BLOCKS>([&](int rank) -> const Moments& { return of_blocks[rank]; });
}

// The sums of each of K values over the blocks of the cluster, likewise.
template <int K>
DEVICE void cluster_sum(double (&values)[K]) {
    if (CLUSTER_BLOCKS == 1) return;
    __shared__ double of_blocks[CLUSTER_BLOCKS][K];
    cluster_wait();
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
