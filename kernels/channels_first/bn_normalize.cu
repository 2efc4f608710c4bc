// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Each team merges the parts of its channel, in the same order in every block, and then takes its
// share of the channel's packs.
// Mirror: numpy_ops.bn_normalize
#include "packs.cuh"
#include "../normalizing.cuh"
#include "../parts.cuh"
#include "../running.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 || WIDTH < 4 || MASKED ? 80 : 72) bn_normalize(
    const data_t* x,                         // [N, C, L]
    Moments moments,                         // or null: normalise with the running statistics
    Affine affine,
    Running running,                         // moved in training
    Epilogue epilogue,                       // what ReLU passed is written
    // outputs
    data_t* out,                             // [N, C, L]; may be x or the residual
    Statistics statistics,                   // or null
    // sizes
    long long parts,
    ChannelsFirst sizes) {
    const Place place(sizes, BACKWARDS);
    const index_t c = (index_t)place.c;  // of fewer registers: there are none to spare
    Channel& channel = channel_of_team();
    __shared__ ChannelMoments merged[TEAMS];  // needed again at the end; here it takes no registers until then
    ChannelMoments& batch = merged[team()];
    if (member() < WARP) {
        ChannelMoments all;
        if (moments.count) all = merge_parts(moments, 1, sizes.C, parts, c);
        if (member() == 0) {
            if (!moments.count) all = {1, running.mean.get(c), running.var.get(c)};  // var() is m2 / 1
            channel = make_channel(all.mean, all.var(), affine, read_affine(affine, c));
            batch = all;
        }
    }
    __syncthreads();

    const Left left(epilogue.mask, place);
    normalize_all(InMemory{x}, Packs(place, sizes), left, epilogue, OneChannel(channel), out);
    if (!place.owns()) return;
    set_statistics(statistics, batch, c);
    if (MASKED && !(batch.count > 1)) return;
    if (moments.count && running.mean) update_running(batch, read_running(running, c), running, moments.batches, c);
}
