// mean_and_var: mean and biased variance of each channel, from the P parts of bn_stats
//
// There is a block for each channel.
// Mirror: numpy_ops.mean_and_var
#include "parts.cuh"

extern "C" __global__ void REGISTERS(80) mean_and_var(
    Moments moments,
    // outputs
    data_t* mean,                            // [C]
    data_t* var,                             // [C]
    // sizes
    long long parts,
    long long C) {
    const long long c = channel_of_block();
    if (c >= C) return;
    const ChannelMoments all = merge_parts(moments, 1, C, parts, c);
    if (threadIdx.x == 0) {
        narrow(all.count > 0 ? all.mean : all.var(), mean[c]);  // NaN where there are no values
        narrow(all.var(), var[c]);
    }
}
