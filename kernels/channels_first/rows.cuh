// Channels first, [N, C, L], in groups of channels: which packs of a row a thread takes.
//
// A row is one group of one sample: what shares one mean and one variance. It lies in memory as one piece, and consists
// of runs: a run is a channel, L elements that share weight and bias. If ELEMENTWISE, L is 1, each element has a weight
// and a bias of its own, and the whole row counts as one run.
//
// A team, or the blocks of a cluster, take a row. The team is divided into squads, and a squad goes from run to run, its
// threads side by side. In a cluster each block takes a share of every run.
//
//     runs of 5 packs, TEAM = 8, squads of 4
//     run 0 | 0 1 2 3 0 |
//     run 1 | 4 5 6 7 4 |
//     run 2 | 0 1 2 3 0 |
#pragma once
#include "../mask.cuh"
#include "../row.cuh"
#include "statistics.cuh"

#ifndef ROWS_AT_ONCE
#define ROWS_AT_ONCE 1
#endif

// The sizes that a kernel is given.
struct Rows {
    long long N;
    long long groups;   // rows of a sample
    long long runs;     // runs of a row
    long long L;        // elements of a run
    long long squad;    // threads of a squad, a power of two
    long long packs;    // packs of a run that a squad takes, in a cluster of each run those of one block
    long long samples;  // rows that a team takes, some at once: those of one group in neighbouring samples
};

// What a thread takes of the rows of its team.
struct RowPlace {
    index_t row_elements;      // elements of a row
    index_t group;             // the number of the rows within their samples
    long long part;            // the number of what the block, or cluster, leaves for the next launch
    index_t first, last;       // samples: from first to last - 1; none if the team has nothing to do
    int squad, place;          // the thread's squad, and its place there
    int squads;                // squads of a team
    int runs, packs;           // how many runs the thread takes part in, and its packs in each of them
    index_t begin;             // the thread's first pack in a run
    int slots;                 // packs that a thread keeps at most, of each array

    DEVICE explicit RowPlace(const Rows& sizes) {
        const index_t block = blockIdx.x / CLUSTER_BLOCKS, groups = (index_t)sizes.groups;
        row_elements = (index_t)(sizes.runs * sizes.L);
        if (ELEMENTWISE) {
            part = block / groups;
            group = block - (index_t)part * groups;
            first = ((index_t)part * TEAMS + team()) * (index_t)sizes.samples;
        } else {
            const index_t number = block * TEAMS + team();
            first = number / groups;
            part = first;
            group = number - first * groups;
        }
        last = min(first + (index_t)sizes.samples, (index_t)sizes.N);
        const int log_squad = __ffs((int)sizes.squad) - 1, rank = CLUSTER_BLOCKS > 1 ? cluster_rank() : 0;
        squad = member() >> log_squad;
        place = member() & ((int)sizes.squad - 1);
        squads = TEAM >> log_squad;
        const index_t share = (index_t)sizes.packs, end = min((rank + 1) * share, (index_t)(sizes.L / WIDTH));
        begin = rank * share + place;
        packs = begin < end ? (int)((end - begin + (int)sizes.squad - 1) >> log_squad) : 0;
        runs = squad < sizes.runs ? (int)((sizes.runs - squad + squads - 1) / squads) : 0;
        slots = turns(sizes) * (int)((share + sizes.squad - 1) >> log_squad);
    }
    // How many times a squad takes a run of a row, counting a last time at which some squads have none.
    DEVICE int turns(const Rows& sizes) const { return (int)((sizes.runs + squads - 1) / squads); }
};

// The packs of a thread in a row, one after the other.
class RowPacks {
    index_t at, stride;      // the first element of the next one, and elements from one to the one after it
    index_t wrap;            // how many more from the last one in a run to the first one in the next run
    int left, of_run, squads;

  public:
    // Packs of two arrays in flight: fewer where weights and long indices want registers as well.
    static constexpr bool FEW = (ELEMENTWISE && INDEX_BITS == 64) || (WIDTH == 8 && ARCHITECTURE < 800);
    static constexpr int PAIRS = FEW ? 1 : PACK_BYTES < 8 ? 4 : 2;
    int count;  // how many the thread has
    int run;    // the run of the one that next() has given last

    DEVICE RowPacks(const RowPlace& own, const Rows& sizes, index_t row) {
        of_run = left = own.packs;
        count = own.runs * own.packs;
        squads = own.squads;
        run = own.squad;
        stride = (index_t)sizes.squad * WIDTH;
        wrap = own.squads * (index_t)sizes.L - of_run * stride;
        at = row * own.row_elements + own.squad * (index_t)sizes.L + own.begin * WIDTH;
    }
    DEVICE index_t next() {
        if (!ELEMENTWISE && left == 0) {
            left = of_run;
            at += wrap;
            run += squads;
        }
        left--;
        const index_t own = at;
        at += stride;
        return own;
    }
};

// Place of a thread's packs in shared memory, of one of the arrays and of one of the rows that a team takes at once: the
// first one, which the others follow TEAM apart.
DEVICE raw_t* kept(const RowPlace& own, int array = 0, int row = 0) {
    return staging() + ((array * ROWS_AT_ONCE + row) * TEAMS + team()) * own.slots * TEAM + member();
}
// Packs that the block keeps in shared memory, of so many arrays.
DEVICE int kept_packs(const RowPlace& own, int arrays) {
    return ON_CHIP ? arrays * ROWS_AT_ONCE * TEAMS * own.slots * TEAM : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weight and bias

// Weight and bias of the channels of a row, which are contiguous and of dtype PARAMETER_T.
struct Parameters {
    typedef PARAMETER_T value_t;
    const value_t *weight, *bias;  // null stands for 1 and 0

    // The parameters of the row that begins at channel c.
    DEVICE Parameters(const Affine& affine, index_t c)
        : weight(affine.weight ? (const value_t*)affine.weight.data + c : nullptr),
          bias(affine.bias ? (const value_t*)affine.bias.data + c : nullptr) {}

    // The values for a pack in this run, whose first element is this one of the row.
    DEVICE void weights(int run, index_t element, acc_t (&values)[WIDTH]) const { get(weight, 1, run, element, values); }
    DEVICE void biases(int run, index_t element, acc_t (&values)[WIDTH]) const { get(bias, 0, run, element, values); }

    // The values for a single element.
    DEVICE acc_t weight_of(int run, index_t element) const { return get(weight, 1, run, element); }
    DEVICE acc_t bias_of(int run, index_t element) const { return get(bias, 0, run, element); }

  private:
    DEVICE static acc_t get(const value_t* from, acc_t otherwise, int run, index_t element) {
        return from ? (acc_t)widen(from[ELEMENTWISE ? element : run]) : otherwise;
    }
    DEVICE static void get(const value_t* from, acc_t otherwise, int run, index_t element, acc_t (&values)[WIDTH]) {
        if (ELEMENTWISE && from) {
            unpack_from(from + element, values);
            return;
        }
        const acc_t value = from ? (acc_t)widen(from[run]) : otherwise;
#pragma unroll
        for (int e = 0; e < WIDTH; e++) values[e] = value;
    }
    // Reads WIDTH values, in loads of up to 16 bytes.
    DEVICE static void unpack_from(const value_t* from, acc_t (&values)[WIDTH]) {
        constexpr int BYTES = WIDTH * sizeof(value_t), LOAD = BYTES < 16 ? BYTES : 16, EACH = LOAD / sizeof(value_t);
        typedef typename Raw<LOAD>::type loaded_t;
#pragma unroll
        for (int i = 0; i < BYTES / LOAD; i++) {
            const loaded_t raw = reinterpret_cast<const loaded_t*>(from)[i];
            unsigned words[(LOAD + 3) / 4];
            to_words(raw, words);
#pragma unroll
            for (int e = 0; e < EACH; e++) values[i * EACH + e] = (acc_t)widen(Elements<value_t>::get(words, e));
        }
    }
    DEVICE static void to_words(const uint4& raw, unsigned* w) { w[0] = raw.x, w[1] = raw.y, w[2] = raw.z, w[3] = raw.w; }
    DEVICE static void to_words(const uint2& raw, unsigned* w) { w[0] = raw.x, w[1] = raw.y; }
    DEVICE static void to_words(unsigned raw, unsigned* w) { w[0] = raw; }
    DEVICE static void to_words(unsigned short raw, unsigned* w) { w[0] = raw; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sums over a row

// Waits until all threads of a team are there: those of a warp are as soon as it is.
DEVICE void team_wait() {
    if (TEAM > WARP)
        __syncthreads();
    else
        __syncwarp();
}

// Makes two values their sums over some neighbouring threads of a warp: at first half of the threads go on with each.
template <int LANES>
DEVICE void both_sums(double (&values)[2]) {
    constexpr int HALF = LANES / 2;
    const bool second = threadIdx.x & HALF;
    const double own = second ? values[1] : values[0], given = second ? values[0] : values[1];
    double sums[1] = {own + __shfl_xor_sync(ALL_LANES, given, HALF)};
    lanes_sum<HALF>(sums);
    const double other = __shfl_xor_sync(ALL_LANES, sums[0], HALF);
    values[0] = second ? other : sums[0];
    values[1] = second ? sums[0] : other;
}

// The sums of two values over the threads that take a row: the team, in all blocks of the cluster. Each team leaves
// those of its rows, one by one; there is one barrier for all of them. Turns, 0 and 1, take two places: so that a team
// may leave those of its next rows while another thread still reads.
class RowSumsOfTwo {
    static constexpr int LANES = TEAM < WARP ? TEAM : WARP;  // threads of a warp that are of one team
    double of_warps[2][ROWS_AT_ONCE][2][THREADS / LANES];
    double of_blocks[2][ROWS_AT_ONCE][2][CLUSTER_BLOCKS];

    DEVICE void of_block(int turn, int row, double (&values)[2]) const {
#pragma unroll
        for (int k = 0; k < 2; k++)
            values[k] = of_warps[turn][row][k][team() * TEAM_WARPS + threadIdx.x % WARP % TEAM_WARPS];
        if constexpr (TEAM_WARPS > 1) both_sums<TEAM_WARPS>(values);
    }

  public:
    // Leaves the values of this thread for a row. All threads of the warp call it.
    DEVICE void leave(int turn, int row, double (&values)[2]) {
        both_sums<LANES>(values);
        if (threadIdx.x % LANES == 0)
#pragma unroll
            for (int k = 0; k < 2; k++) of_warps[turn][row][k][threadIdx.x / LANES] = values[k];
    }
    // Waits for what others have left. All threads call it, of all blocks of a cluster.
    DEVICE void wait(int turn) {
        team_wait();
        if constexpr (CLUSTER_BLOCKS > 1) {
#pragma unroll 1
            for (int row = 0; row < ROWS_AT_ONCE; row++) {
                double values[2];
                of_block(turn, row, values);
                if (threadIdx.x == 0)
#pragma unroll
                    for (int k = 0; k < 2; k++) give_all(of_blocks[turn][row][k][cluster_rank()], values[k]);
            }
            cluster_arrive();
            cluster_wait();
        }
    }
    // The sums of a row: all threads get the same bits.
    DEVICE void of_row(int turn, int row, double (&values)[2]) const {
        if constexpr (CLUSTER_BLOCKS == 1) {
            of_block(turn, row, values);
        } else {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                values[k] = 0;
#pragma unroll
                for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) values[k] += of_blocks[turn][row][k][rank];
            }
        }
    }
};

// The sums behind the statistics of a row. All threads of the block construct theirs, and in a cluster all blocks.
#if CENTERED
struct RowSums {
    Total<acc_t> total;

    template <class Source>
    DEVICE RowSums(const Source& x, const RowPacks& packs, double pivot)
        : total(total_of(x, packs, Everything(), pivot)) {
        cluster_wait();  // all blocks have started
        gather(total);
    }
    DEVICE ChannelMoments moments(double count) const { return total.moments(count); }
};
#else
// Adds the squares of a thread's packs in the dtype A, chunk by chunk. Returns whether it held them.
template <class A, class Source>
DEVICE bool add_squares(const Source& x, RowPacks packs, double& sum) {
    constexpr int AT_ONCE = CHUNK<A>, SUMS = AT_ONCE * WIDTH < 4 ? AT_ONCE * WIDTH : 4;
    bool held = true;
    sum = 0;
    as_they_come<AT_ONCE>(x, packs.count, [&](auto full, int i, int count) {
        raw_t raw[AT_ONCE];
        A sums[SUMS] = {};
        bool zero = true;
        each<AT_ONCE>(full, count, [&](int u) { raw[u] = x.get(packs.next(), i + u); });
        each<AT_ONCE>(full, count, [&](int u) {
            acc_t values[WIDTH];
            unpack(raw[u], values);
#pragma unroll
            for (int e = 0; e < WIDTH; e++) {
                const A value = (A)values[e];
                A& own = sums[(u * WIDTH + e) % SUMS];
                own = multiply_add(value, value, own);
                zero = zero && values[e] == 0;
            }
        });
        const A own = sum_pairs(sums);
        held = held && (IS_FLOAT16 || held_squares<A>(own) || zero);
        sum += own;
    });
    return held;
}

struct RowSums {
    double squares[1];

    template <class Source>
    DEVICE RowSums(const Source& x, const RowPacks& packs, double) {
        if (!add_squares<acc_t>(x, packs, squares[0]) && sizeof(acc_t) < 8) add_squares<double>(x, packs, squares[0]);
        cluster_wait();  // all blocks have started
        team_sum(squares);
        cluster_sum(squares);
    }
    // Moments about 0, in place of the mean.
    DEVICE ChannelMoments moments(double count) const { return {count, 0, squares[0]}; }
};
#endif
