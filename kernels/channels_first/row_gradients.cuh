// Channels first, in rows: the sums of the way back, over the packs of a thread, and the gradients of the row.
#pragma once
#include "../gradients.cuh"
#include "rows.cuh"

// Packs whose sums are taken in float32 before they go on in float64.
constexpr int SUMMED = PACK_BYTES < 8 ? 8 : 4;

// How the way back works out elements.
struct RowElements {
    Parameters parameters;
    const Row* row;
    Gate gate;
    const passed_t* record;
    index_t start;             // the first element of the row

    // Calls body(e, dy, g, xhat) for each element of the pack that begins at this place, in this run: dy where
    // activation passed it, else 0, and g = weight * dy.
    template <class Body>
    DEVICE void each(const raw_t& raw_dy, const raw_t& raw_x, index_t at, int run, const RowFactors<acc_t>& factors,
                     Body body) const {
        acc_t weight[WIDTH];
        parameters.weights(run, at - start, weight);
        each(raw_dy, raw_x, at, run, weight, factors, body);
    }
    template <class Body>
    DEVICE void each(const raw_t& raw_dy, const raw_t& raw_x, index_t at, int run, const acc_t (&weight)[WIDTH],
                     const RowFactors<acc_t>& factors, Body body) const {
        const unsigned bits = gate == OPEN     ? ~0u
                              : gate == RECORD ? record[at / WIDTH]
                                               : passed(raw_x, at, run, weight, factors);
        const Words of_dy(raw_dy), of_x(raw_x);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            acc_t dy = widen(Elements<data_t>::get(of_dy.w, e));
            if (gate != OPEN && !(bits >> e & 1)) dy = 0;  // never 0 * dy: it may be inf
            body(e, dy, mul(dy, weight[e]), factors.xhat(widen(Elements<data_t>::get(of_x.w, e))));
        }
    }
    // Calls body(e, dy, g, xhat) likewise, element by element and in float64: it is rare, and is to take no registers.
    template <class Source, class Body>
    DEVICE void each_exactly(const Source& from_dy, const Source& from_x, index_t at, int i, int run, Body body) const {
        const RowFactors<double> exact = row->exact();
#pragma unroll 1
        for (int e = 0; e < WIDTH; e++) {
            const index_t element = at - start + e;
            const acc_t x = widen(from_x.element(at, i, e)), weight = parameters.weight_of(run, element);
            acc_t dy = widen(from_dy.element(at, i, e));
            bool passes = gate == OPEN || (gate == RECORD && record[at / WIDTH] >> e & 1);
            if (gate == INPUT) {
                const acc_t bias = parameters.bias_of(run, element);
                passes = row->wide ? multiply_add(exact.xhat(x), (double)weight, (double)bias) > 0
                                   : multiply_add(row->usual.xhat(x), weight, bias) > 0;
            }
            if (!passes) dy = 0;
            body(e, dy, (double)dy * weight, exact.xhat(x));
        }
    }

  private:
    // A bit for each element that ReLU passed, by the very value that the way forward saw.
    DEVICE unsigned passed(const raw_t& raw_x, index_t at, int run, const acc_t (&weight)[WIDTH],
                           const RowFactors<acc_t>& factors) const {
        acc_t bias[WIDTH], x[WIDTH];
        unpack(raw_x, x);
        parameters.biases(run, at - start, bias);
        unsigned bits = 0;
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            bits |= (unsigned)(multiply_add(factors.xhat(x[e]), weight[e], bias[e]) > 0) << e;
        return bits;
    }
};

// Whether float32 may have lost some of the products in this sum, which are too small for it.
DEVICE bool lost(float sum) { return sum != 0 && fabs(sum) < 1e-30f; }
DEVICE bool lost(double) { return false; }

// Takes two sums over the next `count` packs of a thread, from number `first` on, of SUMMED packs at a time in the dtype
// of the arithmetic: of g and g * xhat if ELEMENTWISE, else of dy and dy * xhat. Returns whether that held them.
template <class Source>
DEVICE bool sum_usually(const Source& dy, const Source& x, RowPacks& packs, int first, int count,
                        const RowElements& elements, double (&sums)[2]) {
    constexpr int SUMS = WIDTH < 4 ? WIDTH : 4;  // side by side: few roundings for each
    constexpr int IN_FLIGHT = RowPacks::PAIRS;
    const RowFactors<acc_t> factors = elements.row->usual;
    bool all_held = true;
    sums[0] = sums[1] = 0;
    in_batches<SUMMED>(count, [&](auto full, int i, int there) {
        acc_t of_g[SUMS] = {}, of_g_xhat[SUMS] = {};
#pragma unroll
        for (int next = 0; next < SUMMED; next += IN_FLIGHT) {
            raw_t raw_dy[IN_FLIGHT], raw_x[IN_FLIGHT];
            index_t at[IN_FLIGHT];
            int run[IN_FLIGHT];
            each<IN_FLIGHT>(full, max(there - next, 0), [&](int u) {
                at[u] = packs.next();
                run[u] = packs.run;
                raw_dy[u] = dy.get(at[u], first + i + next + u);
                raw_x[u] = x.get(at[u], first + i + next + u);
            });
            each<IN_FLIGHT>(full, max(there - next, 0), [&](int u) {
                acc_t kept[WIDTH];
                elements.each(raw_dy[u], raw_x[u], at[u], run[u], factors, [&](int e, acc_t dy, acc_t g, acc_t xhat) {
                    kept[e] = dy;
                    if (!ELEMENTWISE) g = dy;
                    of_g[e % SUMS] += g;
                    of_g_xhat[e % SUMS] = multiply_add(g, xhat, of_g_xhat[e % SUMS]);
                });
                if (elements.gate != OPEN) dy.put(pack(kept), first + i + next + u);
            });
        }
        const acc_t sum = sum_pairs(of_g), product = sum_pairs(of_g_xhat);
        all_held = all_held && held(sum) && held(product) && !lost(product);
        sums[0] += sum;
        sums[1] += product;
    });
    return all_held;
}

// Takes the same sums in float64.
template <class Source>
DEVICE void sum_exactly(const Source& dy, const Source& x, RowPacks& packs, int first, int count,
                        const RowElements& elements, double (&sums)[2]) {
    sums[0] = sums[1] = 0;
#pragma unroll 1
    for (int i = first; i < first + count; i++) {
        const index_t at = packs.next();
        elements.each_exactly(dy, x, at, i, packs.run, [&](int e, acc_t of_dy, double g, double xhat) {
            if (elements.gate != OPEN) {
                data_t kept;
                narrow(of_dy, kept);
                dy.put_element(kept, i, e);
            }
            if (!ELEMENTWISE) g = of_dy;
            sums[0] += g;
            sums[1] += g * xhat;
        });
    }
}

// Takes the same sums in the dtype of the arithmetic or, where that does not hold them, in float64.
template <class Source>
DEVICE void sum_packs(const Source& dy, const Source& x, RowPacks& packs, int first, int count,
                      const RowElements& elements, double (&sums)[2]) {
    const RowPacks before = packs;
    if ((sizeof(acc_t) == 8 || !elements.row->wide) && sum_usually(dy, x, packs, first, count, elements, sums)) return;
    if (sizeof(acc_t) == 8) return;
    packs = before;
    sum_exactly(dy, x, packs, first, count, elements, sums);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of runs

// The sums of a run by the warps of its squad, where that is larger than a warp: they lie behind the packs in shared
// memory.
DEVICE double* of_warps(const RowPlace& own, const Rows& sizes) {
    const int warps = (int)sizes.squad / WARP;
    double* const all = reinterpret_cast<double*>(staging() + kept_packs(own, 2));
    return all + 2 * team() * warps * sizes.runs;
}

// The place of the sums of the runs of a row.
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
// memory, in pieces that one load or store moves. If not SUMS_ON_CHIP, the block has a single team, which adds them
// to its part in memory.
class Columns {
    static constexpr int EACH = 2 * WIDTH * sizeof(acc_t) < 16 ? 2 * WIDTH : 16 / sizeof(acc_t);  // sums in a piece
    static constexpr int PIECES = 2 * WIDTH / EACH;

  public:
    struct __align__(EACH * sizeof(acc_t)) Piece {
        acc_t values[EACH];
    };

  private:
    Piece* all;        // those of the block
    long long first;   // the place of the row's first element among the sums
    Sums sums;         // or null
    DEVICE Piece& piece(const RowPlace& own, int team, int i, int p) const {
        return all[((team * own.slots + i) * PIECES + p) * TEAM + member()];
    }

  public:
    DEVICE Columns(const RowPlace& own, const Rows& sizes, const Sums& sums, index_t channel)
        : all(reinterpret_cast<Piece*>(staging() + kept_packs(own, 2))),
          first(own.part * sizes.groups * own.row_elements + channel), sums(sums) {
        if constexpr (ELEMENTWISE && SUMS_ON_CHIP)
            for (int i = 0; sums.dy && i < own.packs; i++)
#pragma unroll
                for (int p = 0; p < PIECES; p++)
#pragma unroll
                    for (int k = 0; k < EACH; k++) piece(own, team(), i, p).values[k] = 0;
    }
    // Adds those of pack i of the thread, which begins at this element: sum(dy) and sum(dy * xhat) of one element after
    // the other.
    DEVICE void add(const RowPlace& own, int i, index_t element, const acc_t (&more)[2 * WIDTH], bool begun) const {
        if (!sums.dy) return;
#pragma unroll
        for (int e = 0; !SUMS_ON_CHIP && e < WIDTH; e++)
            add_to_part(element + e, more[2 * e], more[2 * e + 1], begun);
#pragma unroll
        for (int p = 0; SUMS_ON_CHIP && p < PIECES; p++) {
            Piece sum = piece(own, team(), i, p);
#pragma unroll
            for (int k = 0; k < EACH; k++) sum.values[k] += more[p * EACH + k];
            piece(own, team(), i, p) = sum;
        }
    }
    // Adds those of a single element.
    DEVICE void add_one(const RowPlace& own, int i, int e, index_t element, double dy, double dy_xhat) const {
        if (!sums.dy) return;
        if (SUMS_ON_CHIP) {
            Piece& place = piece(own, team(), i, 2 * e / EACH);
            place.values[2 * e % EACH] += (acc_t)dy;
            place.values[2 * e % EACH + 1] += (acc_t)dy_xhat;
        } else {
            add_to_part(element + e, dy, dy_xhat, true);  // `add` has been there
        }
    }
    // Adds to the sums of an element in memory, or begins them: it is always the same thread that does.
    DEVICE void add_to_part(index_t element, double dy, double dy_xhat, bool begun) const {
        const long long at = first + element;
        set_sums(sums, at, {begun ? sums.dy[at] + dy : dy, begun ? sums.dy_xhat[at] + dy_xhat : dy_xhat});
    }
    // Adds up the sums of all teams, and writes them to the part of the block. All threads call it.
    DEVICE void finish(const RowPlace& own, const Rows& sizes) const {
        if (!ELEMENTWISE || !SUMS_ON_CHIP || !sums.dy) return;
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

// Writes the gradients of a thread's packs in a row of runs, given its means of g and g * xhat.
template <class Source>
DEVICE void write_runs(const Source& dy, const Source& x, RowPacks packs, const RowElements& elements,
                       const Gradients& gradients) {
    constexpr int AT_ONCE = RowPacks::PAIRS;
    const RowFactors<acc_t> factors = elements.row->usual;
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
            acc_t kept[WIDTH], dx[WIDTH];
            elements.each(raw_dy[u], raw_x[u], at[u], run[u], factors, [&](int e, acc_t dy, acc_t g, acc_t xhat) {
                kept[e] = dy;
                dx[e] = factors.input_gradient(g, xhat);
            });
            store(gradients.dx + at[u], pack(dx));
            if (gradients.dresidual) store(gradients.dresidual + at[u], pack(kept));
        });
    });
}

// Writes the gradients of a thread's packs in the rows that a team takes at once, `count` of them, whose elements each
// have a weight. Pack by pack, row by row: so a weight is read once for all rows, and what they add to the sums of an
// element is added to them once; `begun` is whether earlier rows have. What is known of row r is elements_of(r); from_dy(r) and from_x(r) are its sources.
template <class ElementsOf, class FromDy, class FromX>
DEVICE void write_elements(const ElementsOf& elements_of, const FromDy& from_dy, const FromX& from_x, int count,
                           const RowPlace& own, const Rows& sizes, const Gradients& gradients,
                           const Columns& columns, bool begun) {
#pragma unroll 1
    for (int i = 0; i < own.packs; i++) {
        const index_t element = (own.begin + (index_t)i * (int)sizes.squad) * WIDTH;
        acc_t weight[WIDTH], sums[2 * WIDTH] = {};
        elements_of(0).parameters.weights(0, element, weight);
#pragma unroll 1
        for (int r = 0; r < count; r++) {
            const RowElements elements = elements_of(r);
            if (elements.row->exact_gradients) continue;
            const RowFactors<acc_t> factors = elements.row->usual;
            const index_t at = elements.start + element;
            acc_t kept[WIDTH], dx[WIDTH];
            elements.each(from_dy(r).get(at, i), from_x(r).get(at, i), at, 0, weight, factors,
                          [&](int e, acc_t dy, acc_t g, acc_t xhat) {
                              kept[e] = dy;
                              dx[e] = factors.input_gradient(g, xhat);
                              sums[2 * e] += dy;
                              sums[2 * e + 1] = multiply_add(dy, xhat, sums[2 * e + 1]);
                          });
            store(gradients.dx + at, pack(dx));
            if (gradients.dresidual) store(gradients.dresidual + at, pack(kept));
        }
        columns.add(own, i, element, sums, begun);
    }
}

// Writes the gradients of a thread's packs in a row that float32 does not hold, in float64.
template <class Source>
DEVICE void write_exactly(const Source& dy, const Source& x, RowPacks packs, const RowElements& elements,
                          const Gradients& gradients, const RowPlace& own, const Columns& columns) {
    const RowFactors<double> factors = elements.row->exact();
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        const index_t at = packs.next();
        elements.each_exactly(dy, x, at, i, packs.run, [&](int e, acc_t of_dy, double g, double xhat) {
            if (ELEMENTWISE) columns.add_one(own, i, e, at - elements.start, of_dy, (double)of_dy * xhat);
            if (gradients.dresidual) narrow(of_dy, gradients.dresidual[at + e]);
            narrow(factors.input_gradient(g, xhat), gradients.dx[at + e]);
        });
    }
}
