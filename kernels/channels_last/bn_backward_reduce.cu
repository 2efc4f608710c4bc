// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Block (t, p) takes part p of the channels of tile t.
// Mirror: numpy_ops.bn_backward_reduce
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(128) bn_backward_reduce(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [M, C / WIDTH], as bn_normalize left it, or null
    // outputs
    double* sums_dy,                         // [P, C]
    double* sums_dy_xhat,                    // [P, C]
    // sizes
    long long M,
    long long C,
    long long tile,
    long long rows_per_share) {
    const Tile own(M, C, tile, rows_per_share, blockIdx.y);
    const long long c = own.channel();
    __shared__ Lanes lanes;
    if (own.looks_after())
        lanes.set(threadIdx.x, make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c)));
    const OwnChannels channels(own, lanes);

    ColumnSums of_thread;
    double sums[2];
    sum_all(InMemory{dy}, InMemory{x}, Packs(own), gate_of(activation, mask), mask, channels, of_thread);
    sum_tile(own, of_thread, sums);
    if (!own.looks_after()) return;
    const Channel& channel = lanes.channels[threadIdx.x];
    const long long part = blockIdx.y * C + c;
    sums_dy[part] = sums[0];
    sums_dy_xhat[part] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
}
