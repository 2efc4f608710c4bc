// bn_forward: batch norm in training, out = activation((x - mean) * rstd * weight + bias + residual), and the running
// statistics follow
//
// Each element is read once. A block takes a tile of columns, which fits into its shared memory; each thread keeps some
// of the packs of one column there. It adds them up as they come in; the sums of all threads make the statistics.
// Mirror: numpy_ops.bn_forward
#include "../normalizing.cuh"
#include "../running.cuh"
#include "statistics.cuh"

extern "C" __global__ void REGISTERS(128) bn_forward(
    const data_t* x,                         // [M, C]
    Affine affine,
    Running running,                         // moved; there is a momentum
    Epilogue epilogue,                       // what ReLU passed is written
    // outputs
    data_t* out,                             // [M, C]; may be x or the residual
    Statistics statistics,                   // or null
    // sizes
    ChannelsLast sizes) {
    const Tile own(sizes);
    const long long c = own.channel();
    const Packs packs(own);
    const Left left(epilogue.mask, own);
    raw_t* const kept = staging() + threadIdx.x;
    const OnChip source = {kept, stage<CHUNK>({kept}, {x}, packs)};
    ChannelAffine given;
    __shared__ ChannelRunning before[MOST_LANES];  // read while copies are on their way; not in registers
    if (own.looks_after()) {
        given = read_affine(affine, c);
        if (running.mean) before[threadIdx.x] = read_running(running, c);
    }

    const ChannelMoments batch = moments_of(own, source, packs, left, x);
    __shared__ Lanes lanes;
    if (own.looks_after()) lanes.set(threadIdx.x, make_channel(batch.mean, batch.var(), affine, given));
    const OwnChannels channels(own, lanes);

    normalize_all(source, packs, left, epilogue, channels, out);
    if (!own.looks_after()) return;
    set_statistics(statistics, batch, c);
    if (running.mean) update_running(batch, before[threadIdx.x], running, nullptr, c);
}
