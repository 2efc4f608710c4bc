// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Each team adds the parts of its channel, in the same order in every block, and then takes its share of the channel's
// packs.
// Mirror: numpy_ops.bn_backward_input
#include "packs.cuh"
#include "../gradients.cuh"
#include "../parts.cuh"

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 && MASKED ? 128 : 80) bn_backward_input(
    const data_t* dy,                        // [N, C, L]
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    Sums sums,                               // or null: not needed
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    Gradients gradients,
    // sizes
    long long parts,
    ChannelsFirst sizes) {
    const Place place(sizes, BACKWARDS);
    const long long c = place.c;
    const Packs packs(place, sizes);
    Channel& channel = channel_of_team();
    double all[2];
    if (member() < WARP) add_parts(sums, parts, sizes.C, c, all);
    if (member() == 0) {
        channel = channel_of(statistics, affine, c);
        set_gradient(channel, all, over_left(inv_count, statistics));
    }
    __syncthreads();

    const Left left(epilogue.mask, place);
    const OneChannel known(channel);
    input_gradients_all(InMemory{dy}, InMemory{x}, packs, left, epilogue, inv_count == 0, known, gradients);
    if (place.owns()) set_vectors(gradients.dweight, gradients.dbias, all, c);
}
