// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Block (t, s) adds the parts of the channels of tile t, in the same order in every block, and then takes its share of the
// rows.
// Mirror: numpy_ops.bn_backward_input
#include "../gradients.cuh"
#include "parts.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 || WIDTH == 8 ? 128 : 80) bn_backward_input(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [M, C / WIDTH], as bn_normalize left it, or null
    const double* sums_dy,                   // [P, C] or null: not needed
    const double* sums_dy_xhat,              // [P, C] or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [M, C]
    data_t* dresidual,                       // [M, C] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long parts,
    long long M,
    long long C,
    long long tile,
    long long rows_per_share) {
    const Tile own(M, C, tile, rows_per_share, backwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    Channel channel;
    if (own.looks_after())
        channel = make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c));
    double sums[2] = {0, 0};
    if (sums_dy) add_parts(own, sums_dy, sums_dy_xhat, parts, C, sums);
    if (own.looks_after()) {
        set_gradient(channel, sums[0], sums[1], inv_count);
        lanes.set(threadIdx.x, channel);
    }
    const OwnChannels channels(own, lanes);
    if (own.looks_after() && own.begin == 0) {
        if (dbias) dbias.set(c, sums[0]);
        if (dweight) dweight.set(c, sums[1]);
    }

    input_gradients_all(InMemory{dy}, InMemory{x}, Packs(own), gate_of(activation, mask), mask, inv_count == 0, channels,
                        dx, dresidual);
}
