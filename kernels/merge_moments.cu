// merge_moments: count, mean and m2 of each channel over P parts, as a row: one count, C means, C m2
//
// A block per channel. The parts are those of bn_stats, arrays of their own, or those of ranks, rows like this one:
// so many elements lie between a part and the next one.
// Mirror: numpy_ops.merge_moments
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) merge_moments(
    const double* moments_count,             // [P]
    const double* moments_mean,              // [P, C]
    const double* moments_m2,                // [P, C]
    // outputs
    double* row,                             // [1 + 2 C]
    // sizes
    long long parts,
    long long C,
    long long count_stride,
    long long stride) {
    const long long c = blockIdx.x + (long long)blockIdx.z * gridDim.x;
    if (c >= C) return;
    const Moments all = merge_parts(moments_count, count_stride, moments_mean, moments_m2, stride, parts, c);
    if (threadIdx.x == 0) {
        if (c == 0) row[0] = all.count;
        row[1 + c] = all.mean;
        row[1 + C + c] = all.m2;
    }
}
