// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each element is read once. A team, or all blocks of a cluster, take a channel, which fits into their shared memory;
// each thread keeps some of its packs there. It adds them up as they come in; the sums of all threads make the
// statistics.
// Mirror: numpy_ops.bn_forward
#include "../normalizing.cuh"
#include "statistics.cuh"
#include "../running.cuh"

extern "C" __global__ void CLUSTER REGISTERS(96) bn_forward(
    const data_t* x,                         // [N, C, L]
    Affine affine,
    Running running,                         // moved; there is a momentum
    Epilogue epilogue,                       // what ReLU passed is written
    // outputs
    data_t* out,                             // [N, C, L]; may be x or the residual
    Statistics statistics,                   // or null
    // sizes
    ChannelsFirst sizes) {
    cluster_start();
    const Place place(sizes);
    const long long c = place.c;
    const Packs packs(place, sizes);
    const Left left(epilogue.mask, place);
    raw_t* const own = kept(sizes);
    const OnChip source = {own, stage<CHUNK<acc_t>>({own}, {x}, packs)};
    struct OfTeam {
        ChannelAffine given;     // read while copies are on their way; kept where it takes no registers
        ChannelRunning running;  // read and kept in the same way
        ChannelMoments batch;
        Channel channel;
    };
    __shared__ OfTeam of_teams[TEAMS];
    OfTeam& mine = of_teams[team()];
    if (member() == 0) {
        mine.given = read_affine(affine, c);
        if (running.mean) mine.running = read_running(running, c);
    }

    Total<acc_t> total = total_of(source, packs, left, widen(x[c * sizes.L]));
    cluster_wait();  // all blocks have started
    gather(total);
    if (member() == 0) {
        mine.batch = total.moments((double)(sizes.N * sizes.L));
        mine.channel = make_channel(mine.batch.mean, mine.batch.var(), affine, mine.given);
    }
    __syncthreads();

    normalize_all(source, packs, left, epilogue, OneChannel(mine.channel), out);
    if (!place.owns()) return;
    const ChannelMoments batch = mine.batch;
    set_statistics(statistics, batch, c);
    if (running.mean) update_running(batch, mine.running, running, nullptr, c);
}
