// bn_double_backward_input: the gradients of second order (double_backward.cuh): ddy, dx and dweight from the cotangents
// cdx, cdweight, cdbias and cdresidual
//
// Each team adds the parts of its channel, in the same order in every block, and then takes its share of the channel's
// packs.
// Mirror: numpy_double_backward.bn_double_backward_input
#include "../double_backward.cuh"
#include "../parts.cuh"
#include "packs.cuh"

// The factors of all elements of a team.
struct OneSecond {
    SecondFactors<acc_t> own;
    const SecondFactors<double>* factors;

    DEVICE explicit OneSecond(const SecondFactors<double>& factors) : own(in_dtype<acc_t>(factors)), factors(&factors) {}
    DEVICE const SecondFactors<acc_t>& usual(int) const { return own; }
    DEVICE const SecondFactors<double>& wide(int) const { return *factors; }
};

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 ? 128 : 80) bn_double_backward_input(
    Incoming incoming,
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    SecondSums sums,                         // or null: not needed
    double inv_count,                        // 1 / count in training; 0: the statistics are constants
    // outputs
    SecondGradients gradients,
    // sizes
    long long parts,
    ChannelsFirst sizes) {
    const Place place(sizes, BACKWARDS);
    const Packs packs(place, sizes);
    Channel& channel = channel_of_team();
    __shared__ SecondFactors<double> of_teams[TEAMS];
    SecondFactors<double>& factors = of_teams[team()];
    if (member() < WARP) {
        double all[SECOND_SUMS] = {};
        for (long long p = member(); p < parts; p += WARP) add_second_sums(sums, p * sizes.C + place.c, all);
        lanes_sum<WARP>(all);
        if (member() == 0) {
            channel = channel_of(statistics, affine, place.c);
            const double dweight =
                set_second_gradient(channel, factors, all, inv_count, incoming, gate_of(epilogue), place.c);
            if (gradients.dweight && place.owns()) gradients.dweight.set(place.c, dweight);
        }
    }
    __syncthreads();

    second_gradients_all(incoming, x, packs, epilogue, inv_count == 0, OneChannel(channel), OneSecond(factors),
                         gradients);
}
