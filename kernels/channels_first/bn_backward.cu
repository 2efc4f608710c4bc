// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. A team, or all blocks of a cluster, take a channel of both, which fit into their shared memory; each
// thread keeps some of the packs there. Where ReLU stopped dy it becomes 0 on chip, on the way to the sums.
// Mirror: numpy_ops.bn_backward
#include "gradient_sums.cuh"

extern "C" __global__ void CLUSTER REGISTERS(96) bn_backward(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    const double* statistics_mean,           // [C]
    const double* statistics_var,            // [C]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    long long activation,                    // 0: none, 1: ReLU
    const mask_t* mask,                      // [N, C, L / WIDTH], as bn_normalize left it, or null
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    data_t* dx,                              // [N, C, L]
    data_t* dresidual,                       // [N, C, L] or null
    Vector dweight,                          // [C] or null
    Vector dbias,                            // [C] or null
    // sizes
    long long N,
    long long C,
    long long L,
    long long packs_per_block) {
    cluster_start();
    const Place place(C, false);
    const long long c = place.c;
    const index_t begin = cluster_rank() * packs_per_block;
    const Packs own(place, C, L, begin, min(begin + (index_t)packs_per_block, (index_t)(N * L / WIDTH)));
    raw_t* const kept_dy = staging() + team() * packs_per_block + member();
    raw_t* const kept_x = kept_dy + TEAMS * packs_per_block;
    const int group = stage<SUMMED>({kept_dy, kept_x}, {dy, x}, own);
    __shared__ Channel channels[TEAMS];
    Channel& channel = channels[team()];
    if (member() == 0)
        channel = make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c));
    __syncthreads();

    double sums[2];
    sum_all(OnChip{kept_dy, group}, OnChip{kept_x, group}, own, gate_of(activation, mask), mask, OneChannel(channel), sums);
    cluster_wait();  // all blocks have started
    team_sum(sums);
    cluster_sum(sums);
    if (member() == 0) {
        sums[1] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
        set_gradient(channel, sums[0], sums[1], inv_count);
    }
    __syncthreads();

    input_gradients_all(OnChip{kept_dy, group}, OnChip{kept_x, group}, own, OPEN, nullptr, inv_count == 0,
                        OneChannel(channel), dx, dresidual);
    if (!place.owns()) return;
    if (dbias) dbias.set(c, sums[0]);
    if (dweight) dweight.set(c, sums[1]);
}
