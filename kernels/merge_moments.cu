// merge_moments: count, mean and m2 of each channel over P parts, as a row: one count, C means, C m2
//
// There is a block for each channel. The parts are those of bn_stats, arrays of their own, or those of ranks, which lie
// in rows like this one.
// Mirror: numpy_ops.merge_moments
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) merge_moments(
    Moments moments,
    // outputs
    double* row,                             // [1 + 2 C]
    // sizes
    long long parts,
    long long C,
    long long count_stride,                  // elements from the count of a part to that of the next one
    long long stride) {                      // elements from a part's mean or m2 to the next one's
    const long long c = channel_of_block();
    if (c >= C) return;
    const ChannelMoments all = merge_parts(moments, count_stride, stride, parts, c);
    if (threadIdx.x == 0) {
        if (c == 0) row[0] = all.count;
        row[1 + c] = all.mean;
        row[1 + C + c] = all.m2;
    }
}
