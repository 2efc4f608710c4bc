// Channels last, [M, C]: which packs a thread takes, and sums down the columns of a tile.
//
// A row is C / WIDTH whole packs, which stand in as many columns. A block takes a tile of neighbouring columns, a power
// of two of them up to a warp, and a range of rows. The threads of a block stand in rows as long as the tile. Each goes
// down one column in steps of all rows of threads, and has the same WIDTH channels all the time.
//
//     8 threads, tile = 4, 6 columns | 0 1 2 3 | 0 1 |     the last tile: threads 2, 3, 6, 7 have nothing to do
//                                    | 4 5 6 7 | 4 5 |
//                                    | 0 1 2 3 | 0 1 |
//
// Lane q of a tile is its q-th channel; thread q of the block looks after it wherever something is done once for a
// channel.
#pragma once
#include "../batches.cuh"
#include "../elementwise.cuh"
#include "../mask.cuh"

// Lanes of a tile at most: 128 bytes of a row, the most that memory hands out at a time.
constexpr int MOST_LANES = 128 / sizeof(data_t);
constexpr int WARPS = THREADS / WARP;  // warps of a block
static_assert((THREADS & (THREADS - 1)) == 0, "rows of threads are a power of two as well");

// The sizes that a kernel is given.
struct ChannelsLast {
    long long M;
    long long C;
    long long tile;  // columns of a tile
    long long rows;  // rows of the array that a block takes
};

// What a block takes: a tile of columns, and the rows of its share.
struct Tile {
    index_t C, first;      // channels of the array, and the first one of the tile
    int columns, lanes;    // columns of the tile, which are the threads of a row as well; channels that there are in it
    int lane, row;         // this thread's first lane, and its row of threads
    int step, log_step;    // how many rows of threads there are, and the binary logarithm of that
    index_t begin, end;    // the block's rows: from begin to end - 1

    // The tile that begins with channel `first` and ends before `last` at the latest, and some rows.
    DEVICE Tile(index_t C, int columns, index_t first, index_t last, index_t begin, index_t end)
        : C(C), first(first), columns(columns), lanes((int)min((index_t)columns * WIDTH, last - first)), begin(begin),
          end(end) {
        const int log_columns = __ffs(columns) - 1;
        lane = (threadIdx.x & (columns - 1)) * WIDTH;
        row = threadIdx.x >> log_columns;
        step = THREADS >> log_columns;
        log_step = __ffs(THREADS) - 1 - log_columns;
    }
    // The tile of a block that takes this share of the rows.
    DEVICE explicit Tile(const ChannelsLast& sizes, index_t share = 0)
        : Tile((index_t)sizes.C, (int)sizes.tile, (index_t)blockIdx.x * (int)sizes.tile * WIDTH, (index_t)sizes.C,
               min(share * (index_t)sizes.rows, (index_t)sizes.M),
               min(min(share * (index_t)sizes.rows, (index_t)sizes.M) + (index_t)sizes.rows, (index_t)sizes.M)) {}
    // Whether this thread looks after a channel.
    DEVICE bool looks_after() const { return (int)threadIdx.x < lanes; }
    // Whether it also writes what there is once for the channel.
    DEVICE bool owns() const { return looks_after() && begin == 0; }
    // The channel that it looks after; the last one of the tile if it looks after none.
    DEVICE index_t channel() const { return first + min((int)threadIdx.x, lanes - 1); }
    // The first lane of the thread's column or, if it has no column, that of the last one.
    DEVICE int known_lane() const { return min(lane / WIDTH, lanes / WIDTH - 1) * WIDTH; }
};

// The share of a block: its number among those that take the same tile. backwards() is for launches that read what
// another one has just read: the last of it is still in the L2 cache.
DEVICE index_t forwards() { return blockIdx.y; }
DEVICE index_t backwards() { return gridDim.y - 1 - blockIdx.y; }

// The packs of a thread, one after the other.
class Packs {
    index_t at, stride;  // the first element of the next one, and how many there are from one to the one after it

  public:
    // Packs of two arrays in flight: fewer where factors or indices take many registers.
    static constexpr int PAIRS = sizeof(index_t) == 8 ? (PACK_BYTES < 8 ? 4 : 2)
                                 : WIDTH == 8         ? 2
                                 : PACK_BYTES < 8     ? 6
                                                      : 4;
    int count;  // how many the thread has

    DEVICE explicit Packs(const Tile& tile) {
        const index_t rows = tile.end - tile.begin - tile.row + tile.step - 1;  // steps that are begun count as well
        count = tile.lane < tile.lanes && rows > 0 ? (int)(rows >> tile.log_step) : 0;
        at = (tile.begin + tile.row) * tile.C + tile.first + tile.lane;
        stride = tile.step * tile.C;
    }
    DEVICE index_t next() {
        const index_t own = at;
        at += stride;
        return own;
    }
};

// What is left of the packs of a thread: the mask has a byte for each row.
struct LeftOfColumn {
    const bool* mask;
    index_t first, step;  // the first row of the thread, and rows from one to the next one

    DEVICE LeftOfColumn(const bool* mask, const Tile& tile)
        : mask(mask), first(tile.begin + tile.row), step(tile.step) {}
    DEVICE index_t at(int i) const { return first + i * step; }
    DEVICE unsigned bits(int i) const { return bits_of<1>(mask + at(i)) ? ~0u : 0; }
};
#if MASKED
typedef LeftOfColumn Left;
#else
struct Left : Everything {
    DEVICE Left(const bool*, const Tile&) {}
};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The channels of a tile

// What the threads of a block have to know of the tile's channels, in shared memory: the channel of each lane, and its
// factors in the dtype of the arithmetic, each in an array over lanes.
struct Lanes {
    Channel channels[MOST_LANES];
    __align__(16) acc_t center[MOST_LANES];
    __align__(16) acc_t rstd[MOST_LANES];
    __align__(16) acc_t scale[MOST_LANES];
    __align__(16) acc_t shift[MOST_LANES];
    __align__(16) acc_t slope[MOST_LANES];
    __align__(16) acc_t offset[MOST_LANES];

    DEVICE void set(int q, const Channel& channel) {
        channels[q] = channel;
        const Factors<acc_t> f(channel);
        center[q] = f.center;
        rstd[q] = f.rstd;
        scale[q] = f.scale;
        shift[q] = f.shift;
        slope[q] = f.slope;
        offset[q] = f.offset;
    }
};

// The channels of the elements of this thread's packs, as `Channels` of elementwise.cuh. All threads of a block
// construct theirs together, when lanes are set: it is a barrier.
struct OwnChannels {
    Factors<acc_t> own[WIDTH];
    const Channel* channels;  // the thread's own, in shared memory
    bool any_wide;            // whether any channel of the tile is wide

    DEVICE OwnChannels(const Tile& tile, const Lanes& lanes) : channels(lanes.channels + tile.known_lane()) {
        const int q = threadIdx.x, lane = tile.known_lane();
        any_wide = __syncthreads_or(tile.looks_after() && lanes.channels[q].wide);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            own[e].center = lanes.center[lane + e];
            own[e].rstd = lanes.rstd[lane + e];
            own[e].scale = lanes.scale[lane + e];
            own[e].shift = lanes.shift[lane + e];
            own[e].slope = lanes.slope[lane + e];
            own[e].offset = lanes.offset[lane + e];
        }
    }
    DEVICE bool is_wide(int e) const { return channels[e].wide; }
    DEVICE bool gate_is_wide(int e) const { return channels[e].gate_wide; }
    DEVICE const Factors<acc_t>& usual(int e) const { return own[e]; }
    DEVICE Factors<double> wide(int e) const { return Factors<double>(channels[e]); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Sums over the threads of a block, in an order that never changes

// Adds up N values of each thread of a warp over the threads that have the same column, which stand `columns` apart. In
// each step two threads share the work: one goes on with the first half of the sums, the other one with the rest.
// keep(i, sum) is called by one thread for each i.
template <class Keep>
DEVICE void fold(const double (&values)[1], int first, int distance, int columns, Keep keep) {
    double sum = values[0];
    bool another = false;
#pragma unroll 1
    for (; distance >= columns; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        another = another || threadIdx.x & distance;
    }
    if (!another) keep(first, sum);
}
template <int N, class Keep>
DEVICE void fold(const double (&values)[N], int first, int distance, int columns, Keep keep) {
    if (distance < columns) {
#pragma unroll
        for (int i = 0; i < N; i++) keep(first + i, values[i]);
        return;
    }
    const bool second = threadIdx.x & distance;
    double halves[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const double own = second ? values[N / 2 + i] : values[i], given = second ? values[i] : values[N / 2 + i];
        halves[i] = own + __shfl_xor_sync(ALL_LANES, given, distance);
    }
    fold(halves, second ? first + N / 2 : first, distance / 2, columns, keep);
}

// The sums of K values of each lane over the threads of the block that have it. values[k * WIDTH + e] is value k of a
// thread's element e; thread q gets the sums of lane q. All threads call it.
template <int K>
DEVICE void sum_tile(const Tile& tile, const double (&values)[K * WIDTH], double (&sums)[K]) {
    __shared__ double of_warps[WARPS][K][MOST_LANES];
    const int warp = threadIdx.x / WARP, q = threadIdx.x;
    fold(values, 0, WARP / 2, tile.columns,
         [&](int i, double sum) { of_warps[warp][i / WIDTH][tile.lane + i % WIDTH] = sum; });
    __syncthreads();
    if (q < tile.lanes)
#pragma unroll
        for (int k = 0; k < K; k++) {
            double each[WARPS];
#pragma unroll
            for (int w = 0; w < WARPS; w++) each[w] = of_warps[w][k][q];
            sums[k] = sum_pairs(each);
        }
}
