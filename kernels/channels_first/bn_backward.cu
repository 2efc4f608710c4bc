// bn_backward: all gradients, dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// dy and x are read once. A team, or all blocks of a cluster, take one channel after the other, which fits into their shared
// memory; each thread keeps some of its packs there. Where ReLU stopped dy it becomes 0 on chip, on the way to the sums.
// While the gradients are written, the packs of the next channel are already on their way.
// Mirror: numpy_ops.bn_backward
#include "gradients.cuh"

extern "C" __global__ void CLUSTER REGISTERS(128) bn_backward(
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
    const index_t groups = gridDim.x / CLUSTER_BLOCKS * TEAMS, ahead = groups * L;  // channels at a time
    index_t first = blockIdx.x / CLUSTER_BLOCKS * TEAMS;                         // of the block
    const index_t begin = cluster_rank() * packs_per_block;
    Packs own(first + team(), C, L, begin, min(begin + (index_t)packs_per_block, (index_t)(N * L / WIDTH)));
    const int count = own.count, group = group_of<SUMMED>(count);
    raw_t* const kept_dy = staging() + team() * packs_per_block + member();
    raw_t* const kept_x = kept_dy + TEAMS * packs_per_block;
    OnChip places[2] = {{kept_dy, address_of(kept_dy), group, dy, 0}, {kept_x, address_of(kept_x), group, x, 0}};
    if (first + team() >= C) own.count = 0;
    fill(places, own);
    __shared__ Channel channels[2][TEAMS];  // of this turn and of the next one
    const auto prepare = [&](index_t c, int turn) {
        channels[turn % 2][team()] =
            make_channel(statistics_mean[c], statistics_var[c], eps, read_affine(weight, bias, c));
    };
    const auto channel_of = [&](index_t block) { return min(block + team(), (index_t)C - 1); };  // idle teams: the last
    if (member() == TEAM - 1) prepare(channel_of(first), 0);
    cluster_wait();  // all blocks have started

    for (int turn = 0; first < C; turn++) {
        const index_t c = channel_of(first), next = first + groups;
        const bool some = first + team() < C, more = next + team() < C;
        Channel& channel = channels[turn % 2][team()];
        __syncthreads();
        double sums[2];
        sum_all(places[0], places[1], own, gate_of(activation, mask), mask, channel, sums);
        team_sum(sums);
        cluster_sum(sums, turn);
        if (member() == 0) {
            sums[1] = unscaled(sums[1]) - channel.rest * channel.rstd * sums[0];
            set_gradient(channel, sums[0], sums[1], inv_count);
        }
        __syncthreads();

        if (member() == TEAM - 1 && next < C) prepare(channel_of(next), turn + 1);
        places[0].array = more ? dy : nullptr;
        places[1].array = more ? x : nullptr;
        places[0].ahead = places[1].ahead = ahead;
        input_gradients_all(places[0], places[1], own, OPEN, nullptr, inv_count == 0, channel, dx, dresidual);
        if (some && cluster_rank() == 0 && member() == 0) {
            if (dbias) dbias.set(c, sums[0]);
            if (dweight) dweight.set(c, sums[1]);
        }
        first = next;
        own = own.shifted(ahead);
        own.count = more ? count : 0;
    }
}
