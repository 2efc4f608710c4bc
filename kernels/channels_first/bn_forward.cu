// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each element is read once. A team, or all blocks of a cluster, take a channel, which fits into their shared memory; each
// thread keeps some of its packs there. It adds them up as they come in; the sums of all threads make the statistics.
// Mirror: numpy_ops.bn_forward
#include "../normalizing.cuh"
#include "statistics.cuh"
#include "../running.cuh"

extern "C" __global__ void CLUSTER REGISTERS(96) bn_forward(
    const data_t* x,                         // [N, C, L]
    double eps,
    Vector weight,                           // [C] or null
    Vector bias,                             // [C] or null
    const data_t* residual,                  // [N, C, L] or null
    long long activation,                    // 0: none, 1: ReLU
    Vector running_mean,                     // [C] or null; updated
    Vector running_var,                      // [C] or null; updated
    double momentum,
    long long* num_batches_tracked,          // [] or null
    // outputs
    data_t* out,                             // [N, C, L]; may be x or residual
    mask_t* mask,                            // [N, C, L / WIDTH] or null: where ReLU passes
    double* statistics_mean,                 // [C] or null
    double* statistics_var,                  // [C] or null
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
    raw_t* const kept = staging() + team() * packs_per_block + member();
    const OnChip packs = {kept, stage<CHUNK<acc_t>>({kept}, {x}, own)};
    struct OfTeam {
        Affine given;     // read while copies are on their way, and kept where no registers are wanted
        Running running;  // likewise
        Moments batch;
        Channel channel;
    };
    __shared__ OfTeam of_teams[TEAMS];
    OfTeam& mine = of_teams[team()];
    if (member() == 0) {
        mine.given = read_affine(weight, bias, c);
        if (running_mean) mine.running = read_running(running_mean, running_var, c);
    }

    Total<acc_t> total = total_of(packs, own, widen(x[c * L]));
    cluster_wait();  // all blocks have started
    gather(total);
    if (member() == 0) {
        mine.batch = total.moments((double)(N * L));
        mine.channel = make_channel(mine.batch.mean, mine.batch.m2 / mine.batch.count, eps, mine.given);
    }
    __syncthreads();

    normalize_all(packs, own, residual, activation, OneChannel(mine.channel), out, mask);
    if (!place.owns()) return;
    const Moments batch = mine.batch;
    if (statistics_mean) statistics_mean[c] = batch.mean;
    if (statistics_var) statistics_var[c] = batch.m2 / batch.count;
    if (running_mean) update_running(batch, mine.running, running_mean, running_var, momentum, nullptr, c);
    if (c == 0 && num_batches_tracked) *num_batches_tracked += 1;
}
