// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Team (c, s) adds the parts of channel c, in the same order in every block, and then takes its share of the channel.
// Mirror: numpy_ops.bn_backward_input
#include "packs.cuh"
#include "../gradients.cuh"
#include "../parts.cuh"

extern "C" __global__ void REGISTERS(80) bn_backward_input(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [N, C, L / WIDTH], as bn_normalize left it, or null
    const double* sums_dy,                   // [P, C] or null: not needed
    const double* sums_dy_xhat,              // [P, C] or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [N, C, L]
    data_t* dresidual,                       // [N, C, L] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long parts,
    long long N,
    long long C,
    long long L,
    long long packs_per_share) {
    const Place place(C, true);
    const long long c = place.c;
    const index_t begin = (index_t)place.share * packs_per_share;
    const Packs own(place, C, L, begin, min(begin + (index_t)packs_per_share, (index_t)(N * L / WIDTH)));
    __shared__ Channel channels[TEAMS];
    Channel& channel = channels[team()];
    double sums[2];
    if (member() < WARP) add_parts(sums_dy, sums_dy_xhat, parts, C, c, sums);
    if (member() == 0) {
        channel = make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c));
        set_gradient(channel, sums[0], sums[1], inv_count);
    }
    __syncthreads();

    input_gradients_all(InMemory{dy}, InMemory{x}, own, gate_of(activation, mask), mask, inv_count == 0,
                        OneChannel(channel), dx, dresidual);
    if (!place.owns()) return;
    if (dbias) dbias.set(c, sums[0]);
    if (dweight) dweight.set(c, sums[1]);
}
