// bn_backward_input: dx = (dy - sum(dy) / count - xhat * sum(dy * xhat) / count) * rstd * weight, where activation
// passed dy; dresidual = dy there; dweight = sum(dy * xhat), dbias = sum(dy)
//
// Each block adds the parts of the channels of its tile, in the same order in every block, and then takes its share of
// the rows.
// Mirror: numpy_ops.bn_backward_input
#include "../gradients.cuh"
#include "parts.cuh"

// Whether 80 registers for a thread, with which three blocks are on a multiprocessor, are too few for 32-bit indices.
constexpr bool SPILLS = WIDTH == 8 && (ARCHITECTURE < 800 || ARCHITECTURE >= 1000);

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 || SPILLS || MASKED ? 128 : 80) bn_backward_input(
    const data_t* dy,                        // [M, C]
    const data_t* x,                         // [M, C]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    Sums sums,                               // or null: not needed
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    Gradients gradients,
    // sizes
    long long parts,
    ChannelsLast sizes) {
    const Tile own(sizes, backwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    Channel channel;
    if (own.looks_after()) channel = channel_of(statistics, affine, c);
    double all[2] = {0, 0};
    if (sums.dy) add_parts(own, sums, parts, all);
    if (own.looks_after()) {
        set_gradient(channel, all, over_left(inv_count, statistics));
        lanes.set(threadIdx.x, channel);
    }
    const OwnChannels channels(own, lanes);
    if (own.owns()) set_vectors(gradients.dweight, gradients.dbias, all, c);

    const Left left(epilogue.mask, own);
    input_gradients_all(InMemory{dy}, InMemory{x}, Packs(own), left, epilogue, inv_count == 0, channels, gradients);
}
