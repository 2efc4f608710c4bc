// bn_double_backward_reduce: the sums of second order (double_backward.cuh), of dy, dy * xhat, cdx, cdx * xhat and
// cdx * dy, where activation passed dy, in P parts
//
// Each team takes a share of a channel: share p makes part p.
// Mirror: numpy_double_backward.bn_double_backward_reduce
#include "../double_backward.cuh"
#include "packs.cuh"

// Packs whose sums are taken in float32 before they go on in float64, and of how many packs all arrays are in flight.
constexpr int SUMMED = PACK_BYTES < 8 ? 8 : 4, IN_FLIGHT = PACK_BYTES < 8 ? 4 : 2;

// Takes the sums over a thread's packs, in the dtype A for each batch of AT_ONCE packs; products are scaled. WIDE is
// whether what ReLU passed is worked out in float64. Returns whether the dtype A held the sums.
template <class A, bool WIDE, int AT_ONCE>
DEVICE bool sum_packs(const Incoming& incoming, const data_t* x, Packs packs, const SecondPassed& passed,
                      const OneChannel& channel, double (&sums)[SECOND_SUMS]) {
    constexpr int SIDE = sizeof(A) == 8 || WIDTH < 2 ? 1 : 2;  // sums side by side: few roundings for each
    const Factors<A> f(*channel.channel);
    const A rstd = f.rstd * (A)PRODUCT_SCALE;
    bool all_held = true;
#pragma unroll
    for (int k = 0; k < SECOND_SUMS; k++) sums[k] = 0;
    in_batches<AT_ONCE>(packs.count, [&](auto full, int, int count) {
        A own[SIDE][SECOND_SUMS] = {};
        constexpr int LOADED = AT_ONCE < IN_FLIGHT ? AT_ONCE : IN_FLIGHT;
#pragma unroll 1
        for (int first = 0; first < AT_ONCE; first += LOADED) {
            raw_t raw_dy[LOADED], raw_x[LOADED], raw_cdx[LOADED];
            unsigned bits[LOADED];
#pragma unroll
            for (int u = 0; u < LOADED; u++)
                if (full || first + u < count) {
                    const index_t at = packs.next();
                    raw_dy[u] = load(incoming.dy + at);
                    raw_x[u] = load(x + at);
                    raw_cdx[u] = incoming.cdx ? load(incoming.cdx + at) : raw_t();
                    bits[u] = passed.bits(at);
                }
#pragma unroll
            for (int u = 0; u < LOADED; u++)
                if (full || first + u < count) {
                    acc_t dy[WIDTH], in[WIDTH], cdx[WIDTH];
                    unpack(raw_dy[u], dy);
                    unpack(raw_x[u], in);
                    unpack(raw_cdx[u], cdx);
                    stop<WIDE>(dy, in, passed.gate, bits[u], channel);
#pragma unroll
                    for (int e = 0; e < WIDTH; e++)
                        add_second_products<A>(dy[e], cdx[e], in[e], f, rstd, own[e % SIDE]);
                }
        }
#pragma unroll
        for (int k = 0; k < SECOND_SUMS; k++) {
            const A sum = SIDE == 1 ? own[0][k] : own[0][k] + own[SIDE - 1][k];
            all_held = all_held && held(sum);
            sums[k] += sum;
        }
    });
    return all_held && held_products<A>(sums);
}

extern "C" __global__ void REGISTERS(INDEX_BITS == 64 ? 128 : 80) bn_double_backward_reduce(
    Incoming incoming,
    const data_t* x,                         // [N, C, L]
    Statistics statistics,
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    SecondSums sums,
    // sizes
    ChannelsFirst sizes) {
    const Place place(sizes);
    const Packs packs(place, sizes);
    Channel& channel = channel_of_team();
    __shared__ long long part_of_teams[TEAMS];  // kept here, where it takes no registers
    if (member() == 0) {
        channel = channel_of(statistics, affine, place.c);
        part_of_teams[team()] = place.idle ? -1 : place.share * sizes.C + place.c;
    }
    __syncthreads();

    double own[SECOND_SUMS];
    const OneChannel known(channel);
    bool all_held = false;
    if (sizeof(acc_t) == 8 || !known.any_wide)
        with_gate(epilogue, [&](auto gate) {
            all_held = sum_packs<acc_t, false, SUMMED>(incoming, x, packs, {gate, epilogue.passed}, known, own);
        });
    __syncwarp();  // behind it the channel is read anew: until then its numbers take no registers
    if (sizeof(acc_t) < 8 && !all_held)
        sum_packs<double, true, 1>(incoming, x, packs, {gate_of(epilogue), epilogue.passed}, OneChannel(channel), own);
    team_sum(own);
    const long long part = part_of_teams[team()];
    if (member() > 0 || part < 0) return;
    finish_second_sums(own, channel);
    set_second_sums(sums, part, own);
}
