// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Each block takes a share of the rows of a tile: share p makes part p of its channels.
// Mirror: numpy_ops.bn_backward_reduce
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(128) bn_backward_reduce(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    Sums sums,
    // sizes
    ChannelsLast sizes) {
    const Tile own(sizes, forwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    if (own.looks_after()) lanes.set(threadIdx.x, channel_of(statistics, affine, c));
    const OwnChannels channels(own, lanes);

    ColumnSums of_thread;
    double of_lane[2];
    sum_all(InMemory{dy}, InMemory{x}, Packs(own), Left(epilogue.mask, own), epilogue, channels, of_thread);
    sum_tile(own, of_thread, of_lane);
    if (!own.looks_after()) return;
    finish_sums(of_lane, lanes.channels[threadIdx.x]);
    set_sums(sums, blockIdx.y * sizes.C + c, of_lane);
}
