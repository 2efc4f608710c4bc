// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Team (c, p) takes part p of channel c.
// Mirror: numpy_ops.bn_backward_reduce
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(80) bn_backward_reduce(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [N, C, L / WIDTH], as bn_normalize left it, or null
    // outputs
    double* sums_dy,                         // [P, C]
    double* sums_dy_xhat,                    // [P, C]
    // sizes
    long long N,
    long long C,
    long long L,
    long long packs_per_share) {
    const Place place(C, false);
    const long long c = place.c;
    const index_t begin = (index_t)place.share * packs_per_share;
    const Packs own(place, C, L, begin, min(begin + (index_t)packs_per_share, (index_t)(N * L / WIDTH)));
    __shared__ Channel channels[TEAMS];
    Channel& channel = channels[team()];
    if (member() == 0)
        channel = make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c));
    __syncthreads();

    double sums[2];
    sum_all(InMemory{dy}, InMemory{x}, own, gate_of(activation, mask), mask, OneChannel(channel), sums);
    team_sum(sums);
    if (member() > 0 || place.idle) return;
    const long long part = place.share * C + c;
    sums_dy[part] = sums[0];
    sums_dy_xhat[part] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
}
