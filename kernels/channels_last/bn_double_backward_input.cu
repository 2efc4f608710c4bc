// bn_double_backward_input: the gradients of second order (double_backward.cuh): ddy, dx and dweight from the cotangents
// cdx, cdweight, cdbias and cdresidual
//
// Each block adds the parts of the channels of its tile, in the same order in every block, and then takes its share of
// the rows.
// Mirror: numpy_double_backward.bn_double_backward_input
#include "halves.cuh"
#include "parts.cuh"

// What the threads of a block have to know of the tile's channels beside `Lanes`, in shared memory.
struct SecondLanes {
    SecondFactors<double> factors[MOST_LANES];
    SecondFactors<acc_t> usual[MOST_LANES];
};

// The factors of the elements of this thread's packs. They are constructed once lanes are set, behind a barrier.
struct OwnSeconds {
    SecondFactors<acc_t> own[WIDTH];
    const SecondFactors<double>* factors;

    DEVICE OwnSeconds(const Tile& tile, const SecondLanes& lanes) : factors(lanes.factors + tile.known_lane()) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) own[e] = lanes.usual[tile.known_lane() + e];
    }
    DEVICE const SecondFactors<acc_t>& usual(int e) const { return own[e]; }
    DEVICE const SecondFactors<double>& wide(int e) const { return factors[e]; }
};

// With 80 registers for a thread three blocks are on a multiprocessor; these are too few for packs of 16 bytes.
extern "C" __global__ void REGISTERS(PACK_BYTES == 16 || ARCHITECTURE < 800 ? 128 : 80) bn_double_backward_input(
    Incoming incoming,
    const data_t* x,                         // [M, C]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    SecondSums sums,                         // or null: not needed
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    SecondGradients gradients,
    // sizes
    long long parts,
    ChannelsLast sizes) {
    const Tile own(halved(sizes), backwards());
    const long long c = own.channel();
    __shared__ Lanes lanes;
    __shared__ SecondLanes seconds;
    double all[SECOND_SUMS] = {};
    if (parts) {
        const Standing at(own);
        for (long long p = at.row; p < parts && !at.idle; p += at.rows) add_second_sums(sums, p * sizes.C + at.c, all);
        sum_rows(at, all);
    }
    if (own.looks_after()) {
        const int q = threadIdx.x;
        Channel channel = channel_of(statistics, affine, c);
        const double dweight =
            set_second_gradient(channel, seconds.factors[q], all, inv_count, incoming, gate_of(epilogue), c);
        seconds.usual[q] = in_dtype<acc_t>(seconds.factors[q]);
        lanes.set(q, channel);
        if (gradients.dweight && own.owns()) gradients.dweight.set(c, dweight);
    }
    const OwnChannels channels(own, lanes);
    const OwnSeconds factors(own, seconds);

    second_gradients_all(incoming, x, Packs(own), epilogue, inv_count == 0, channels, factors, gradients);
}
