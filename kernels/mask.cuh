// Masks: which elements of a thread's packs are left. What a mask leaves out is as if it were not there.
//
// A mask has a byte for each position, which all channels share. Kernels are compiled for masks or without: `Left`, in
// the two layouts, is then `Everything`, whose answers the compiler knows.
#pragma once
#include "pack.cuh"
#include "team.cuh"

#ifndef MASKED
#define MASKED 0
#endif

// What is left where there is no mask.
struct Everything {
    // Bit e is whether element e of pack i of the thread is left.
    DEVICE constexpr unsigned bits(int) const { return ~0u; }
    // The place in the mask of that pack's first element.
    DEVICE constexpr index_t at(int) const { return 0; }
};

// A bit for each of BYTES bytes from p on, whether it is not 0. They lie at a multiple of BYTES.
template <int BYTES>
DEVICE unsigned bits_of(const bool* p) {
    if constexpr (BYTES == 8) return bits_of<4>(p) | bits_of<4>(p + 4) << 4;
    unsigned word = *reinterpret_cast<const unsigned char*>(p);
    if constexpr (BYTES == 2) word = *reinterpret_cast<const unsigned short*>(p);
    if constexpr (BYTES == 4) word = *reinterpret_cast<const unsigned*>(p);
    word |= word >> 4;  // the lowest bit of each byte becomes whether there is any in it
    word |= word >> 2;
    word |= word >> 1;
    return (word & 1) | (word >> 7 & 2) | (word >> 14 & 4) | (word >> 21 & 8);
}

// What a mask leaves of the share of a team: how many elements, and the first one's place in the mask.
struct ShareLeft {
    double count;
    index_t first;
};

// The share of a team, of which this thread has found `count` elements left, and the first of them at `first`. All
// threads of the block call it and get the same, once in a kernel.
DEVICE ShareLeft share_left(int count, index_t first) {
    constexpr double NOWHERE = 0x1p62;
    __shared__ double of_warps[THREADS / WARP];
    double least = count > 0 ? (double)first : NOWHERE, counts[1] = {(double)count};
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        least = min(least, __shfl_xor_sync(ALL_LANES, least, distance));
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = least;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < TEAM_WARPS; w++) least = min(least, of_warps[team() * TEAM_WARPS + w]);
    team_sum(counts);
    return {counts[0], counts[0] > 0 ? (index_t)least : 0};
}
