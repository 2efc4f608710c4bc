// bn_normalize: out = activation((x - mean) * rstd * weight + bias + residual)
//
// In training mean and var are the merged parts of bn_stats, and the running statistics follow them; else they are the
// running statistics. Each block merges the parts of the channels of its tile, in the same order in every block, and
// then takes its share of the rows.
// Mirror: numpy_ops.bn_normalize
#include "../normalizing.cuh"
#include "../running.cuh"
#include "parts.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 || MASKED ? 128 : 80) bn_normalize(
    const data_t* x,                         // [M, C]
    Moments moments,                         // or null: normalise with the running statistics
    Affine affine,
    Running running,                         // moved in training
    Epilogue epilogue,                       // what ReLU passed is written
    // outputs
    data_t* out,                             // [M, C]; may be x or the residual
    Statistics statistics,                   // or null
    // sizes
    long long parts,
    ChannelsLast sizes) {
    const Tile own(sizes, backwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    ChannelAffine given;
    if (own.looks_after()) given = read_affine(affine, c);
    ChannelMoments batch = {0, 0, 0};
    if (moments.count) batch = merge_parts(own, moments, parts);
    if (own.looks_after()) {
        if (!moments.count) batch = {1, running.mean.get(c), running.var.get(c)};  // var() is m2 / 1
        lanes.set(threadIdx.x, make_channel(batch.mean, batch.var(), affine, given));
    }
    const OwnChannels channels(own, lanes);

    normalize_all(InMemory{x}, Packs(own), Left(epilogue.mask, own), epilogue, channels, out);
    if (!own.owns()) return;
    set_statistics(statistics, batch, c);
    if (MASKED && !(batch.count > 1)) return;
    if (moments.count && running.mean) update_running(batch, read_running(running, c), running, moments.batches, c);
}
