// Channels first, in rows: the sums of the way back, over the packs of a thread, and the gradients of the row.
#pragma once
#include "../gradients.cuh"
#include "rows.cuh"

// Packs whose sums are taken in float32 before they go on in float64.
constexpr int SUMMED = PACK_BYTES < 8 ? 8 : 4;

// The elements of a pack in the dtype A, as the way back sees them.
template <class A>
struct PackElements {
    acc_t dy[WIDTH];           // where activation passed it, else 0
    A xhat[WIDTH], g[WIDTH];   // g = weight * dy
};

// How a pack's elements are worked out.
struct RowElements {
    Parameters parameters;
    const Row* row;
    Gate gate;
    const passed_t* record;
    index_t start;             // the first element of the row

    // The elements of the pack that begins at this place, in this run.
    template <class A>
    DEVICE PackElements<A> of(const raw_t& raw_dy, const raw_t& raw_x, index_t at, int run,
                              const RowFactors<A>& factors) const {
        PackElements<A> own;
        acc_t x[WIDTH], weight[WIDTH];
        unpack(raw_dy, own.dy);
        unpack(raw_x, x);
        parameters.weights(run, at - start, weight);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) own.xhat[e] = factors.xhat(x[e]);
        if (gate != OPEN) stop(own, x, weight, at, run);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) own.g[e] = mul((A)own.dy[e], (A)weight[e]);
        return own;
    }

  private:
    // Sets dy to 0 where ReLU stopped it, by the record or by the very value that the way forward saw: it is never
    // 0 * dy, as dy may be inf.
    template <class A>
    DEVICE void stop(PackElements<A>& own, const acc_t (&x)[WIDTH], const acc_t (&weight)[WIDTH], index_t at,
                     int run) const {
        unsigned bits = gate == RECORD ? record[at / WIDTH] : 0;
        if (gate == INPUT) {
            acc_t bias[WIDTH];
            parameters.biases(run, at - start, bias);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const bool passes = row->wide ? multiply_add(row->factors<double>().xhat(x[e]), (double)weight[e], (double)bias[e]) > 0
                                              : multiply_add(row->usual.xhat(x[e]), weight[e], bias[e]) > 0;
                bits |= (unsigned)passes << e;
            }
        }
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            if (!(bits >> e & 1)) own.dy[e] = 0;
    }
};

// Whether float32 may have lost some of the products in this sum, which are too small for it.
DEVICE bool lost(float sum) { return sum != 0 && fabs(sum) < 1e-30f; }
DEVICE bool lost(double) { return false; }

// Takes two sums over the next `count` packs of a thread, from number `first` on, in the dtype A for each batch of
// AT_ONCE packs: of g and g * xhat if ELEMENTWISE, else of dy and dy * xhat. Returns whether the dtype A held them.
template <class A, int AT_ONCE, class Source>
DEVICE bool sum_packs(const Source& dy, const Source& x, RowPacks& packs, int first, int count,
                      const RowElements& elements, double (&sums)[2]) {
    constexpr int SUMS = WIDTH < 4 ? WIDTH : 4;  // side by side: few roundings for each
    const RowFactors<A> factors = elements.row->factors<A>();
    bool all_held = true;
    sums[0] = sums[1] = 0;
    in_batches<AT_ONCE>(count, [&](auto full, int i, int there) {
        A of_g[SUMS] = {}, of_g_xhat[SUMS] = {};
        raw_t raw_dy[AT_ONCE], raw_x[AT_ONCE];
        index_t at[AT_ONCE];
        int run[AT_ONCE];
        each<AT_ONCE>(full, there, [&](int u) {
            at[u] = packs.next();
            run[u] = packs.run;
            raw_dy[u] = dy.get(at[u], first + i + u);
            raw_x[u] = x.get(at[u], first + i + u);
        });
        each<AT_ONCE>(full, there, [&](int u) {
            const PackElements<A> own = elements.of<A>(raw_dy[u], raw_x[u], at[u], run[u], factors);
            if (elements.gate != OPEN) dy.put(pack(own.dy), first + i + u);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const A g = ELEMENTWISE ? own.g[e] : (A)own.dy[e];
                of_g[e % SUMS] += g;
                of_g_xhat[e % SUMS] = multiply_add(g, own.xhat[e], of_g_xhat[e % SUMS]);
            }
        });
        const A sum = sum_pairs(of_g), product = sum_pairs(of_g_xhat);
        all_held = all_held && held(sum) && held(product) && !lost(product);
        sums[0] += sum;
        sums[1] += product;
    });
    return all_held;
}

// As above, in the dtype of the arithmetic or, where that does not hold the sums, in float64.
template <class Source>
DEVICE void sum_packs(const Source& dy, const Source& x, RowPacks& packs, int first, int count,
                      const RowElements& elements, double (&sums)[2]) {
    const RowPacks before = packs;
    if ((sizeof(acc_t) == 8 || !elements.row->wide) &&
        sum_packs<acc_t, SUMMED>(dy, x, packs, first, count, elements, sums))
        return;
    if constexpr (sizeof(acc_t) < 8) {
        packs = before;
        sum_packs<double, 1>(dy, x, packs, first, count, elements, sums);
    }
}

// The sums over all packs of a thread in a row whose elements each have a weight.
template <class Source>
DEVICE void sum_row(const Source& dy, const Source& x, RowPacks packs, const RowElements& elements,
                    double (&sums)[2]) {
    wait_but<0>();
    sum_packs(dy, x, packs, 0, packs.count, elements, sums);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of runs

// The sums of a run by the warps of its squad, where that is larger than a warp: they lie behind the packs in shared
// memory.
DEVICE double* of_warps(const RowPlace& own, const Rows& sizes) {
    const int warps = (int)sizes.squad / WARP;
    double* const all = reinterpret_cast<double*>(staging() + (ON_CHIP ? 2 * TEAMS * own.slots * TEAM : 0));
    return all + 2 * team() * warps * sizes.runs;
}

// Where the sums of the runs of a row go.
struct RunSums {
    Sums sums;               // or null
    long long first;         // the place of the first run
    bool idle;               // whether there is no such row

    DEVICE void set(int run, const double (&of_run)[2]) const {
        if (sums.dy && !idle) set_sums(sums, first + run, of_run);
    }
};

// The sums of dy and of dy * xhat of each run of a row, which become a part; `sums` gets what this thread knows of their
// sums over the row, each times the weight of its run.
template <class Source>
DEVICE void sum_runs(const Source& dy, const Source& x, RowPacks packs, const RowElements& elements,
                     const RowPlace& own, const Rows& sizes, const RunSums& runs, double (&sums)[2]) {
    wait_but<0>();
    const int squad = (int)sizes.squad, warps = squad / WARP, turns = own.turns(sizes);
    sums[0] = sums[1] = 0;
    const auto add = [&](int run, const double (&of_run)[2]) {
        acc_t weight[WIDTH];
        elements.parameters.weights(run, 0, weight);
        sums[0] += weight[0] * of_run[0];
        sums[1] += weight[0] * of_run[1];
        runs.set(run, of_run);
    };
    for (int t = 0; t < turns; t++) {
        const int run = own.squad + t * own.squads;
        const bool there = packs.count > 0 && t < own.runs;
        double of_run[2] = {0, 0};
        if (there) sum_packs(dy, x, packs, t * own.packs, own.packs, elements, of_run);
        for (int distance = min(squad, WARP) / 2; distance > 0; distance /= 2)
#pragma unroll
            for (int k = 0; k < 2; k++) of_run[k] += __shfl_xor_sync(ALL_LANES, of_run[k], distance);
        if (run >= sizes.runs) continue;
        if (squad <= WARP) {
            if (own.place == 0) add(run, of_run);
        } else if (own.place % WARP == 0) {
            double* const place = of_warps(own, sizes) + 2 * (run * warps + own.place / WARP);
            place[0] = of_run[0];
            place[1] = of_run[1];
        }
    }
    if (squad <= WARP) return;
    __syncthreads();
    for (int run = member(); run < sizes.runs; run += TEAM) {
        double of_run[2] = {0, 0};
        for (int w = 0; w < warps; w++)
#pragma unroll
            for (int k = 0; k < 2; k++) of_run[k] += of_warps(own, sizes)[2 * (run * warps + w) + k];
        add(run, of_run);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of elements that each have a weight

// The sums of dy and of dy * xhat over the rows of a team, of the elements of each of a thread's packs: in shared
// memory, in pieces that one load or store moves. Where a block has a single row, they go to their part at once.
class Columns {
    static constexpr int EACH = 2 * WIDTH * sizeof(acc_t) < 16 ? 2 * WIDTH : 16 / sizeof(acc_t);  // sums in a piece
    static constexpr int PIECES = 2 * WIDTH / EACH;
    struct __align__(EACH * sizeof(acc_t)) Piece {
        acc_t values[EACH];
    };
    Piece* all;        // those of the block
    long long first;   // the place of the row's first element among the sums
    Sums sums;         // or null
    bool direct;

    DEVICE Piece& piece(const RowPlace& own, int team, int i, int p) const {
        return all[((team * own.slots + i) * PIECES + p) * TEAM + member()];
    }

  public:
    DEVICE Columns(const RowPlace& own, const Rows& sizes, const Sums& sums, index_t channel)
        : all(reinterpret_cast<Piece*>(staging() + (ON_CHIP ? 2 * TEAMS * own.slots * TEAM : 0))),
          first(own.part * sizes.groups * own.row_elements + channel), sums(sums),
          direct(TEAMS == 1 && sizes.samples == 1) {
        if (!ELEMENTWISE || !sums.dy || direct) return;
        for (int i = 0; i < own.packs; i++)
#pragma unroll
            for (int p = 0; p < PIECES; p++)
#pragma unroll
                for (int k = 0; k < EACH; k++) piece(own, team(), i, p).values[k] = 0;
    }
    // Adds those of pack i of the thread, which begins at this element of the row.
    template <class A>
    DEVICE void add(const RowPlace& own, int i, index_t element, const PackElements<A>& pack) const {
        if (!ELEMENTWISE || !sums.dy) return;
        if (direct) {
#pragma unroll
            for (int e = 0; e < WIDTH; e++)
                set_sums(sums, first + element + e, {(double)pack.dy[e], (double)((A)pack.dy[e] * pack.xhat[e])});
            return;
        }
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            Piece& place = piece(own, team(), i, p);
            Piece sum = place;
#pragma unroll
            for (int k = 0; k < EACH; k++) {
                const int e = (p * EACH + k) / 2;
                sum.values[k] += (p * EACH + k) % 2 == 0 ? pack.dy[e] : (acc_t)((A)pack.dy[e] * pack.xhat[e]);
            }
            place = sum;
        }
    }
    // Adds up the sums of all teams, and writes them to the part of the block. All threads call it.
    DEVICE void finish(const RowPlace& own, const Rows& sizes) const {
        if (!ELEMENTWISE || !sums.dy || direct) return;
        __syncthreads();
        for (int i = team(); i < own.packs; i += TEAMS) {
            const index_t element = (own.begin + (index_t)i * (int)sizes.squad) * WIDTH;
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                double both[2] = {0, 0};
                for (int t = 0; t < TEAMS; t++)
#pragma unroll
                    for (int k = 0; k < 2; k++)
                        both[k] += piece(own, t, i, (2 * e + k) / EACH).values[(2 * e + k) % EACH];
                set_sums(sums, first + element + e, both);
            }
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of a row

// Writes the gradients of a thread's packs in the dtype A. The gate is open where dy has been stopped on chip.
template <class A, int AT_ONCE, class Source>
DEVICE void write_packs(const Source& dy, const Source& x, RowPacks packs, const RowElements& elements,
                        const RowFactors<A>& factors, const Gradients& gradients, const RowPlace& own,
                        const Columns& columns) {
    in_batches<AT_ONCE>(packs.count, [&](auto full, int i, int count) {
        raw_t raw_dy[AT_ONCE], raw_x[AT_ONCE];
        index_t at[AT_ONCE];
        int run[AT_ONCE];
        each<AT_ONCE>(full, count, [&](int u) {
            at[u] = packs.next();
            run[u] = packs.run;
            raw_dy[u] = dy.get(at[u], i + u);
            raw_x[u] = x.get(at[u], i + u);
        });
        each<AT_ONCE>(full, count, [&](int u) {
            const PackElements<A> pack_elements = elements.of<A>(raw_dy[u], raw_x[u], at[u], run[u], factors);
            A dx[WIDTH];
#pragma unroll
            for (int e = 0; e < WIDTH; e++) dx[e] = factors.input_gradient(pack_elements.g[e], pack_elements.xhat[e]);
            store(gradients.dx + at[u], pack(dx));
            if (gradients.dresidual) store(gradients.dresidual + at[u], pack(pack_elements.dy));
            columns.add(own, i + u, at[u] - elements.start, pack_elements);
        });
    });
}

// Writes the gradients of a thread's packs, given the means of g and g * xhat over the row.
template <class Source>
DEVICE void write_row(const Source& dy, const Source& x, const RowPacks& packs, RowElements elements,
                      const double (&means)[2], const Gradients& gradients, const RowPlace& own,
                      const Columns& columns) {
    if (ON_CHIP) elements.gate = OPEN;
    Row row = *elements.row;
    row.set_means(means[0], means[1]);
    if (sizeof(acc_t) < 8 && row.wide)
        write_packs<double, 1>(dy, x, packs, elements, row.factors<double>(), gradients, own, columns);
    else
        write_packs<acc_t, RowPacks::PAIRS>(dy, x, packs, elements, row.usual, gradients, own, columns);
}
