// bn_backward_reduce: sum(dy) and sum(dy * xhat), xhat = (x - mean) * rstd, where activation passed dy, in P parts
//
// Each team takes a share of a channel: share p makes part p.
// Mirror: numpy_ops.bn_backward_reduce
#include "gradient_sums.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 && MASKED ? 128 : 80) bn_backward_reduce(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    Sums sums,
    // sizes
    ChannelsFirst sizes) {
    const Place place(sizes);
    const long long c = place.c;
    const Packs packs(place, sizes);
    Channel& channel = channel_of_team();
    if (member() == 0) channel = channel_of(statistics, affine, c);
    __syncthreads();

    double own[2];
    const Left left(epilogue.mask, place);
    sum_all(InMemory{dy}, InMemory{x}, packs, left, epilogue, OneChannel(channel), own);
    team_sum(own);
    if (member() > 0 || place.idle) return;
    finish_sums(own, channel);
    set_sums(sums, place.share * sizes.C + c, own);
}
