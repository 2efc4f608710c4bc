// mean_and_var: mean and biased variance of each channel, from the P parts of bn_stats
//
// A block per channel.
// Mirror: numpy_ops.mean_and_var
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) mean_and_var(
    const double* moments_count,             // [P]
    const double* moments_mean,              // [P, C]
    const double* moments_m2,                // [P, C]
    // outputs
    data_t* mean,                            // [C]
    data_t* var,                             // [C]
    // sizes
    long long parts,
    long long C) {
    const long long c = blockIdx.x + (long long)blockIdx.z * gridDim.x;
    if (c >= C) return;
    const Moments all = merge_parts(moments_count, 1, moments_mean, moments_m2, C, parts, c);
    if (threadIdx.x == 0) {
        narrow(all.mean, mean[c]);
        narrow(all.m2 / all.count, var[c]);
    }
}
