// The state of a launch: its threads, its blocks, who has touched which memory, and how it ends with an error.
#pragma once
#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Index {
    unsigned x, y, z;
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, AT_CLUSTER_BARRIER, DONE };

// Whether two texts are equal; mostly they are the same pointer, which is quicker to compare.
bool same_text(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

// A place in the source, and the function that was called there.
struct Site {
    const char* what;
    const char* file;
    int line;

    bool same_place(const Site& other) const { return line == other.line && same_text(file, other.file); }
    bool operator<(const Site& other) const {
        return std::make_pair(std::string(file), line) < std::make_pair(std::string(other.file), other.line);
    }
};

// A copy from global to shared memory that is on its way.
struct Copy {
    void* to;
    const void* from;
    size_t size, taken;    // only `taken` bytes come from there, the rest are zeros
    uint32_t group;
    const void* pc;
    unsigned char value[16];
};

struct Thread {
    jmp_buf context;
    char* stack = nullptr;
    bool started = false;
    Index index;
    unsigned number;       // index in the block
    State state;
    Site site;             // where it waits
    unsigned mask;         // lanes that it waits for
    int predicate;         // what it votes
    unsigned votes;        // predicates of the lanes of its mask, as bits
    int source;            // the lane whose value it gets, or -1
    uint64_t given[2], received[2];
    uint32_t epoch;        // a clock that goes on whenever the thread waits or arrives
    uint32_t seen[32];     // for each lane of its warp: what the lane did in epochs below lies before this thread
    // State at the barrier of the cluster
    bool arrived;          // whether it has arrived and not waited since
    uint32_t arrival;      // how many of these barriers were over when it arrived
    uint32_t known;        // how many of them it knows to be over
    uint32_t releasing;    // what it did in epochs below lies before an arrival at the current barrier
    uint32_t released;     // the same for the last barrier that is over
    uint32_t released_before;  // the same for the barrier before that
    std::vector<Copy> copies;
    uint32_t groups;       // how many groups of copies are committed
};

constexpr size_t STACK = 256 << 10;

std::vector<std::unique_ptr<Thread>> pool;  // threads of a cluster, block by block, kept from launch to launch
Thread* current = nullptr;
uintptr_t stack_begin;      // lowest address of the current thread's stack
jmp_buf scheduler;

// ---------------------------------------------------------------------------------------------------------------------
// Who has touched what

struct Access {
    uint32_t thread;        // number in the grid, from 1; 0 for nobody
    uint32_t epoch : 30;
    uint32_t atomic : 1;
    uint32_t pending : 1;   // a copy that is still on its way
};

// The last accesses to bytes that have always been accessed together; other_read is by another thread than read.
struct History {
    Access write, read, other_read;
};

struct Free {
    void operator()(void* p) const { free(p); }
};

// The histories of a piece of memory, each for as many bytes (granule) as the accesses so far allow.
struct Shadow {
    static constexpr size_t COARSEST = 16;
    uintptr_t begin, end;   // begin is a multiple of COARSEST
    size_t granule = COARSEST;
    std::unique_ptr<History[], Free> cells;

    Shadow(uintptr_t begin, uintptr_t end) : begin(begin & ~(COARSEST - 1)), end(end) {}

    size_t count() const { return (end - begin + granule - 1) / granule; }
    // Allocates histories without accesses: zeros, for which the system has pages only once they are touched.
    static History* allocate(size_t count) {
        void* cells = calloc(count, sizeof(History));
        if (!cells) abort();
        return (History*)cells;
    }
    void refine(size_t to) {
        const size_t before = count(), pieces = granule / to;
        granule = to;
        if (!cells) return;
        History* finer = allocate(before * pieces);
        for (size_t i = 0; i < before; i++)
            if (cells[i].write.thread || cells[i].read.thread)
                for (size_t k = 0; k < pieces; k++) finer[i * pieces + k] = cells[i];
        cells.reset(finer);
    }
    // The first of the size / granule histories of some bytes.
    History* at(uintptr_t address, size_t size) {
        const uintptr_t low = ((address - begin) | size) & (granule - 1);
        if (low) refine(low & -low);
        if (!cells) cells.reset(allocate(count()));
        return &cells[(address - begin) / granule];
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The launch

// Memory that an argument allows the kernel to touch.
struct Argument {
    uintptr_t begin, end;
    unsigned char* initialised;  // a flag for each byte that was written
    const char* name;
};

struct Range : Argument {
    Shadow shadow;
    explicit Range(const Argument& argument) : Argument(argument), shadow(argument.begin, argument.end) {}
};

struct Result {
    uint64_t bytes_read, bytes_written;
    const void* pc;         // code address of an error, if the message does not have its place
    char message[2000];
};

// The last access of a thread to the shared memory of another block.
struct Visit {
    uint32_t epoch;
    const void* pc;         // code address of the access; null if there was none
};

struct Block {
    Index index;
    uint32_t first_thread;  // number of its first thread in the grid, from 1
    std::unique_ptr<Thread>* threads;
    std::vector<Thread*> ready;
    unsigned at_barrier, done;
    uint32_t barrier;       // what its threads did in epochs below lies before its last barrier
    uint32_t releasing;     // the same for its last barrier before an arrival at the cluster's
    int votes;
    Shadow shared = {0, 0};
    std::vector<Visit> visits;  // one for each thread of the cluster
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    Index grid, block;
    unsigned threads;       // threads of a block
    std::vector<Range> ranges;
    size_t last_range;
    uintptr_t shared_begin, shared_end, dynamic_begin, dynamic_end, dynamic_limit;
    bool has_clusters;      // whether the device has clusters
    std::vector<Block> blocks;  // blocks of the cluster that runs; most clusters have one
    uint32_t first_thread;  // number of the cluster's first thread in the grid, from 1
    unsigned cluster_threads;
    unsigned arrived;       // threads that have arrived at the barrier of the cluster
    uint32_t phase;         // how many barriers of the cluster are over
    std::vector<Thread*> round;
    std::vector<Block*> turns;
    uint64_t accesses;      // accesses by the current thread since it last waited
    uint64_t random;
    Result* result;
};
Launch launch;
Block* block = nullptr;     // the block whose turn it is

constexpr uint64_t MOST_ACCESSES = 1ull << 26;

bool of_cluster(uint32_t thread) { return thread - launch.first_thread < launch.cluster_threads; }

struct Text {
    char text[100];
};

Text describe(uint32_t thread) {
    const uint32_t block = (thread - 1) / launch.threads;
    Text result;
    snprintf(result.text, sizeof result.text, "thread %u of block (%u, %u, %u)", (thread - 1) % launch.threads,
             block % launch.grid.x, block / launch.grid.x % launch.grid.y, block / launch.grid.x / launch.grid.y);
    return result;
}

Text describe(const Block& of) {
    Text result;
    snprintf(result.text, sizeof result.text, "block (%u, %u, %u)", of.index.x, of.index.y, of.index.z);
    return result;
}

bool failed() { return launch.result->message[0]; }

// Sets the message of an error, at which the scheduler ends the launch.
void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch.result->message, sizeof launch.result->message, format, arguments);
    va_end(arguments);
}

// Ends the launch with an error of the current thread, which calls this.
[[noreturn]] void fail(const void* pc, const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    report("%s, in %s", text, describe(block->first_thread + current->number).text);
    launch.result->pc = pc;
    _longjmp(scheduler, 1);
}

// A number below n that depends on the seed (splitmix64).
uint32_t below(uint32_t n) {
    uint64_t z = launch.random += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (uint32_t)(((z ^ z >> 31) >> 32) * n >> 32);
}

template <class T>
void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; i--) std::swap(items[i - 1], items[below((uint32_t)i)]);
}

}  // namespace
