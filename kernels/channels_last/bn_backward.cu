// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. A block takes a tile of columns of both, which fit into its shared memory; each thread keeps some of
// the packs of one column there. Where ReLU stopped dy it becomes 0 on chip, on the way to the sums.
// Mirror: numpy_ops.bn_backward
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(128) bn_backward(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [M, C / WIDTH], as bn_normalize left it, or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [M, C]
    data_t* dresidual,                       // [M, C] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long M,
    long long C,
    long long tile) {
    const Tile own(M, C, tile, M, 0);
    const long long c = own.channel();
    const Packs packs(own);
    raw_t* const kept_dy = staging() + threadIdx.x;
    raw_t* const kept_x = kept_dy + tile * M;
    const int group = stage<ROWS>({kept_dy, kept_x}, {dy, x}, packs);
    const OnChip own_dy = {kept_dy, group}, own_x = {kept_x, group};
    __shared__ Lanes lanes;
    if (own.looks_after())
        lanes.set(threadIdx.x, make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c)));
    double sums[2];
    {
        const OwnChannels before(own, lanes);
        ColumnSums of_thread;
        sum_all(own_dy, own_x, packs, gate_of(activation, mask), mask, before, of_thread);
        sum_tile(own, of_thread, sums);
    }
    if (own.looks_after()) {
        Channel channel = lanes.channels[threadIdx.x];
        sums[1] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
        set_gradient(channel, sums[0], sums[1], inv_count);
        lanes.set(threadIdx.x, channel);
    }
    const OwnChannels after(own, lanes);

    input_gradients_all(own_dy, own_x, packs, OPEN, nullptr, inv_count == 0, after, dx, dresidual);
    if (own.looks_after()) {
        if (dbias) dbias.set(c, sums[0]);
        if (dweight) dweight.set(c, sums[1]);
    }
}
