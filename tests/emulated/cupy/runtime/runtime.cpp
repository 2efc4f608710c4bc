// Runs the blocks of a grid one after the other, every thread a fibre, and watches every access to memory.
//
// Kernels are compiled with -fsanitize=thread and parts of -fsanitize=undefined. The compiler then calls __tsan_read4
// and its like before each access, and __ubsan_handle_... where an access is misaligned, an index beyond an array and so
// on. Nothing of the sanitizers' own libraries is linked: these functions are defined here.
//
// An error ends the launch: the message is kept, and all fibres are abandoned. That jumps over frames of fibres, so what
// runs in a fibre owns nothing: no std::string, no std::vector.
#include <csetjmp>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

struct Index {
    unsigned x, y, z;
};

// ---------------------------------------------------------------------------------------------------------------------
// Threads

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Site {
    const char* what;
    const char* file;
    int line;

    bool same_place(const Site& other) const { return line == other.line && strcmp(file, other.file) == 0; }
    bool operator<(const Site& other) const {
        return std::make_pair(std::string(file), line) < std::make_pair(std::string(other.file), other.line);
    }
};

struct Thread {
    jmp_buf context;
    char* stack = nullptr;
    bool started = false;
    Index index;
    unsigned number;       // in the block
    State state;
    Site site;             // where it waits
    unsigned mask;         // whom it waits for
    int predicate;         // its vote
    unsigned votes;        // of the lanes
    int source;            // the lane whose value it gets, or -1
    uint64_t given[2], received[2];
    uint32_t epoch;        // goes up wherever the thread has waited
    uint32_t seen[32];     // of each lane of its warp: what the lane did in epochs below is known to lie before
};

constexpr size_t STACK = 256 << 10;

std::vector<std::unique_ptr<Thread>> pool;  // threads of a block, kept from launch to launch
Thread* current = nullptr;
uintptr_t stack_begin;      // of the current thread
jmp_buf scheduler;

// ---------------------------------------------------------------------------------------------------------------------
// The launch

struct Access {
    uint32_t thread;        // in the grid, from 1; 0 for nobody
    uint32_t epoch : 31;
    uint32_t atomic : 1;
};

struct History {            // of bytes that have always been accessed together
    Access write, read, other_read;  // the last ones; other_read is by another thread than read
};

struct Free {
    void operator()(void* p) const { free(p); }
};

// The histories of a piece of memory, each of as many bytes as the accesses so far allow.
struct Shadow {
    static constexpr size_t COARSEST = 16;
    uintptr_t begin, end;   // begin is a multiple of COARSEST
    size_t granule = COARSEST;
    std::unique_ptr<History[], Free> cells;

    Shadow(uintptr_t begin, uintptr_t end) : begin(begin & ~(COARSEST - 1)), end(end) {}

    size_t count() const { return (end - begin + granule - 1) / granule; }
    // Zeros, of which the system makes pages as they are touched.
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
    // The first one of size / granule histories.
    History* at(uintptr_t address, size_t size) {
        const uintptr_t low = ((address - begin) | size) & (granule - 1);
        if (low) refine(low & -low);
        if (!cells) cells.reset(allocate(count()));
        return &cells[(address - begin) / granule];
    }
};

struct Argument {           // memory that the kernel may touch
    uintptr_t begin, end;
    unsigned char* initialised;  // a flag for each byte
    const char* name;
};

struct Range : Argument {
    Shadow shadow;
    explicit Range(const Argument& argument) : Argument(argument), shadow(argument.begin, argument.end) {}
};

struct Result {
    uint64_t bytes_read, bytes_written;
    const void* pc;         // of the error, where its place is not in the message
    char message[2000];
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    Index grid, block;
    unsigned threads;       // of a block
    std::vector<Range> ranges;
    size_t last_range;
    uintptr_t shared_begin, shared_end, dynamic_begin, dynamic_end, dynamic_limit;
    Shadow shared = {0, 0};
    Index block_index;
    uint32_t first_thread;  // of the block in the grid, from 1
    uint32_t barrier;       // what the block did in epochs below lies before its last barrier
    int votes;
    uint64_t accesses;      // since the current thread last waited
    uint64_t random;
    Result* result;
};
Launch launch;

constexpr uint64_t MOST_ACCESSES = 1ull << 26;

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

bool failed() { return launch.result->message[0]; }

// Ends the launch, once the scheduler sees it.
void report(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch.result->message, sizeof launch.result->message, format, arguments);
    va_end(arguments);
}

// Ends the launch; called by the current thread.
[[noreturn]] void fail(const void* pc, const char* format, ...) {
    char text[1000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    report("%s, in %s", text, describe(launch.first_thread + current->number).text);
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

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// How far apart what was done before and what the current thread does now are: 0 if the order is known, else 1 in one
// warp, 2 in one block, 3 in different blocks. Other blocks' shared memory is not the same memory.
inline int unordered(const Access& before, bool global) {
    const uint32_t number = before.thread - launch.first_thread;
    if (number >= launch.threads) return before.thread && global ? 3 : 0;
    if (before.epoch < launch.barrier || number == current->number) return 0;
    if (number / 32 != current->number / 32) return 2;
    return before.epoch >= current->seen[number % 32];
}

[[noreturn]] void fail_race(const Access& before, bool wrote, bool write, const char* name, const void* pc) {
    fail(pc, "race on %s: %s what %s has %s, with no barrier between them", name, write ? "writes" : "reads",
         describe(before.thread).text, wrote ? "written" : "read");
}

inline void check_race(History& history, bool write, bool atomic, bool global, const char* name, const void* pc) {
    const Access now = {launch.first_thread + current->number, current->epoch, atomic};
    if (unordered(history.write, global) && !(history.write.atomic && atomic))
        fail_race(history.write, true, write, name, pc);
    if (write) {
        if (unordered(history.read, global)) fail_race(history.read, false, true, name, pc);
        if (unordered(history.other_read, global)) fail_race(history.other_read, false, true, name, pc);
        history = {now, {}, {}};
        return;
    }
    if (history.read.thread != now.thread) {
        // A read that lies before this one needs no memory: what comes after this one comes after that one. Of others,
        // keep the one from farther away.
        const int distance = unordered(history.read, global);
        if (distance > 0 && distance >= unordered(history.other_read, global)) history.other_read = history.read;
    }
    history.read = now;
}

void access_shared(uintptr_t address, size_t size, bool write, bool atomic, const void* pc) {
    if (address + size > launch.shared_end || (launch.dynamic_begin <= address && address < launch.dynamic_limit &&
                                               address + size > launch.dynamic_end))
        fail(pc, "out of bounds: %zu bytes %s past the end of shared memory", size, write ? "written" : "read");
    History* history = launch.shared.at(address, size);
    for (size_t i = 0; i < size; i += launch.shared.granule, history++) {
        // What other blocks wrote was not this memory.
        if ((!write || atomic) && history->write.thread - launch.first_thread >= launch.threads)
            fail(pc, "uninitialised: %zu bytes of shared memory read that nobody has written", size);
        check_race(*history, write, atomic, false, "shared memory", pc);
    }
}

[[noreturn]] void fail_outside(uintptr_t address, size_t size, bool write, const void* pc) {
    char nearest[200] = "no argument is near";
    uintptr_t least = 1 << 20;
    for (const Range& range : launch.ranges) {
        const bool before = address < range.begin;
        const uintptr_t distance = before ? range.begin - address : address + size - range.end;
        if (distance >= least) continue;
        least = distance;
        snprintf(nearest, sizeof nearest, before ? "%zu bytes before the begin of %s" : "%zu bytes past the end of %s",
                 (size_t)distance, range.name);
    }
    fail(pc, "out of bounds: %zu bytes %s (%s)", size, write ? "written" : "read", nearest);
}

bool all_set(const unsigned char* flags, size_t size) {
    for (; size >= 8; flags += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, flags, 8);
        if (word != 0x0101010101010101) return false;
    }
    for (; size > 0; flags++, size--)
        if (!*flags) return false;
    return true;
}

void access_global(uintptr_t address, size_t size, bool write, bool atomic, const void* pc) {
    size_t i = launch.last_range;
    const auto inside = [&](const Range& range) { return range.begin <= address && address + size <= range.end; };
    if (i >= launch.ranges.size() || !inside(launch.ranges[i])) {
        for (i = 0; i < launch.ranges.size() && !inside(launch.ranges[i]);) i++;
        if (i == launch.ranges.size()) fail_outside(address, size, write, pc);
        launch.last_range = i;
    }
    Range& range = launch.ranges[i];
    unsigned char* initialised = range.initialised + (address - range.begin);
    if ((!write || atomic) && !all_set(initialised, size))
        fail(pc, "uninitialised: %zu bytes of %s read that nobody has written", size, range.name);
    if (write) memset(initialised, 1, size);
    if (!write || atomic) launch.result->bytes_read += size;
    if (write) launch.result->bytes_written += size;
    History* history = range.shadow.at(address, size);
    for (size_t k = 0; k < size; k += range.shadow.granule)
        check_race(*history++, write, atomic, true, range.name, pc);
}

inline void access(const void* p, size_t size, bool write, const void* pc, bool atomic = false) {
    const uintptr_t address = (uintptr_t)p;
    if (address - stack_begin < STACK) return;  // the thread's own variables
    if (++launch.accesses > MOST_ACCESSES) fail(pc, "endless loop: %llu accesses to memory", (unsigned long long)MOST_ACCESSES);
    if (launch.shared_begin <= address && address < launch.shared_end)
        access_shared(address, size, write, atomic, pc);
    else
        access_global(address, size, write, atomic, pc);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fibres

void run_thread() {
    for (;;) {
        launch.entry(launch.arguments);
        current->state = DONE;
        if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
    }
}

void resume(Thread& thread) {
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = thread.stack;
    start.uc_stack.ss_size = STACK - thread.number % 128 * 576;  // or all frames would lie in the same lines of the cache
    start.uc_link = nullptr;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
    abort();
}

// A function of its own, without variables that a jump could lose.
__attribute__((noinline)) void run_until_it_waits(Thread& thread) {
    current = &thread;
    stack_begin = (uintptr_t)thread.stack;
    launch.accesses = 0;
    if (_setjmp(scheduler) == 0) resume(thread);
}

void wait(State state, const char* what, const char* file, int line) {
    current->state = state;
    current->site = {what, file, line};
    if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

unsigned warp_size(unsigned warp) { return std::min(32u, launch.threads - warp * 32); }

// Lets the current thread wait for the lanes of mask, and get the value of lane source.
void exchange(const char* what, unsigned mask, int source, int predicate, const char* file, int line) {
    const unsigned lane = current->number % 32;
    if (!(mask >> lane & 1)) fail(nullptr, "%s with mask %08x, which lacks lane %u, at %s:%d", what, mask, lane, file, line);
    if (source >= 0 && ((unsigned)source >= warp_size(current->number / 32) || !(mask >> source & 1)))
        fail(nullptr, "%s from lane %d, which is not in mask %08x, at %s:%d", what, source, mask, file, line);
    current->mask = mask;
    current->source = source;
    current->predicate = predicate;
    wait(AT_WARP_BARRIER, what, file, line);
}

// Lets the lanes go on that the current thread waits for, if all have arrived.
void release_warp(std::vector<Thread*>& ready) {
    const unsigned warp = current->number / 32, size = warp_size(warp);
    const unsigned mask = current->mask & (size == 32 ? ~0u : (1u << size) - 1);
    Thread* lanes[32];
    for (unsigned lane = 0; lane < size; lane++) {
        lanes[lane] = pool[warp * 32 + lane].get();
        // A lane that waits for others may come later, when they have met.
        if (mask >> lane & 1 && (lanes[lane]->state != AT_WARP_BARRIER || lanes[lane]->mask != current->mask)) return;
    }
    const Site& here = current->site;
    uint32_t seen[32] = {};
    unsigned votes = 0;
    for (unsigned lane = 0; lane < size; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Thread& thread = *lanes[lane];
        const Site& there = thread.site;
        // Any __syncwarp goes with any other; of what moves values, all lanes must execute the same.
        if (strcmp(there.what, here.what) != 0 ||
            (!there.same_place(here) && strcmp(here.what, "__syncwarp") != 0))
            return report("lanes disagree: of mask %08x, one is in %s at %s:%d, another in %s at %s:%d", mask, here.what,
                          here.file, here.line, there.what, there.file, there.line);
        if (mask != ~0u)
            for (unsigned i = 0; i < 32; i++) seen[i] = std::max(seen[i], thread.seen[i]);
    }
    for (unsigned lane = 0; lane < size; lane++)
        if (mask >> lane & 1) {
            seen[lane] = ++lanes[lane]->epoch;
            votes |= (unsigned)(lanes[lane]->predicate != 0) << lane;
        }
    for (unsigned lane = 0; lane < size; lane++) {
        if (!(mask >> lane & 1)) continue;
        memcpy(lanes[lane]->seen, seen, sizeof seen);
        lanes[lane]->state = READY;
        lanes[lane]->votes = votes;
        const int source = lanes[lane]->source;  // values are moved now: other lanes may soon hand in their next ones
        if (source >= 0) memcpy(lanes[lane]->received, lanes[source]->given, sizeof lanes[lane]->received);
        ready.push_back(lanes[lane]);
    }
}

// Lets all threads go on.
void release_block(std::vector<Thread*>& ready) {
    const Site& first = pool[0]->site;
    launch.votes = 0;
    for (unsigned i = 0; i < launch.threads; i++) {
        const Thread& thread = *pool[i];
        if (!thread.site.same_place(first))
            return report("different barriers: thread 0 waits at %s:%d, thread %u at %s:%d", first.file, first.line, i,
                          thread.site.file, thread.site.line);
        launch.votes += thread.predicate != 0;
        launch.barrier = std::max(launch.barrier, thread.epoch + 1);
    }
    for (unsigned i = 0; i < launch.threads; i++) {
        pool[i]->state = READY;
        pool[i]->epoch = launch.barrier;
        ready.push_back(pool[i].get());
    }
}

void report_deadlock() {
    std::map<Site, int> waiting;
    int left = 0;
    for (unsigned i = 0; i < launch.threads; i++)
        if (pool[i]->state == DONE)
            left++;
        else
            waiting[pool[i]->site]++;
    std::string text;
    for (const auto& entry : waiting)
        text += ", " + std::to_string(entry.second) + " wait in " + entry.first.what + " at " + entry.first.file + ":" +
                std::to_string(entry.first.line);
    if (left) text += ", " + std::to_string(left) + " have left";
    report("deadlock: of %u threads of block (%u, %u, %u)%s", launch.threads, launch.block_index.x,
           launch.block_index.y, launch.block_index.z, text.c_str());
}

void run_block() {
    std::vector<Thread*> ready, round;
    unsigned at_barrier = 0, done = 0;
    launch.barrier = 0;
    for (unsigned n = 0; n < launch.threads; n++) {
        Thread& thread = *pool[n];
        thread.number = n;
        thread.index = {n % launch.block.x, n / launch.block.x % launch.block.y, n / launch.block.x / launch.block.y};
        thread.state = READY;
        thread.epoch = 0;
        memset(thread.seen, 0, sizeof thread.seen);
        ready.push_back(&thread);
    }
    while (!ready.empty()) {
        round.swap(ready);
        ready.clear();
        shuffle(round);
        for (Thread* thread : round) {
            run_until_it_waits(*thread);
            if (failed()) return;
            if (thread->state == AT_WARP_BARRIER) {
                release_warp(ready);
            } else if (thread->state == DONE) {
                done++;
            } else if (++at_barrier == launch.threads) {
                at_barrier = 0;
                release_block(ready);
            }
            if (failed()) return;
        }
    }
    if (done < launch.threads) report_deadlock();
}

// A stack, below it a page that must not be touched.
char* new_stack() {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, guard + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) abort();
    return (char*)memory + guard;
}

}  // namespace

extern "C" {

// The message of the result is empty if all went well. The grid has fewer than 2^30 threads.
void emulated_launch(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block, char* shared_begin,
                     char* shared_end, char* dynamic_begin, size_t dynamic_size, size_t dynamic_limit,
                     const Argument* ranges, int range_count, uint64_t seed, int flush_denormals, Result* result) {
    memset(result, 0, sizeof *result);
    launch.entry = entry;
    launch.arguments = arguments;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.threads = block[0] * block[1] * block[2];
    launch.ranges.clear();
    for (int i = 0; i < range_count; i++) launch.ranges.emplace_back(ranges[i]);
    launch.last_range = 0;
    launch.shared_begin = (uintptr_t)shared_begin;
    launch.shared_end = (uintptr_t)shared_end;
    launch.dynamic_begin = (uintptr_t)dynamic_begin;
    launch.dynamic_end = launch.dynamic_begin + dynamic_size;
    launch.dynamic_limit = launch.dynamic_begin + dynamic_limit;
    launch.shared = Shadow(launch.shared_begin, launch.shared_end);
    launch.result = result;
    launch.random = seed;
    while (pool.size() < launch.threads) {
        pool.emplace_back(new Thread());
        pool.back()->stack = new_stack();
    }
#if defined(__SSE__)
    const unsigned rounding = _mm_getcsr();
    if (flush_denormals) _mm_setcsr(rounding | 0x8040);
#endif
    std::vector<uint32_t> blocks(grid[0] * grid[1] * grid[2]);
    for (uint32_t b = 0; b < blocks.size(); b++) blocks[b] = b;
    shuffle(blocks);
    for (uint32_t b : blocks) {
        launch.block_index = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        launch.first_thread = b * launch.threads + 1;
        run_block();
        if (failed()) {
            for (auto& thread : pool) thread->started = false;  // where they are, they stay
            break;
        }
    }
#if defined(__SSE__)
    _mm_setcsr(rounding);
#endif
    launch.ranges.clear();
    launch.shared.cells.reset();
}

// Where in its module an address lies.
uint64_t emulated_offset(const void* pc) {
    Dl_info info;
    return dladdr(pc, &info) ? (uintptr_t)pc - (uintptr_t)info.dli_fbase : 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// What device.h declares

Index emulated_thread_idx() { return current->index; }
Index emulated_block_idx() { return launch.block_index; }
Index emulated_block_dim() { return launch.block; }
Index emulated_grid_dim() { return launch.grid; }
unsigned emulated_lane() { return current->number % 32; }

int emulated_block_barrier(const char* what, int predicate, int vote, const char* file, int line) {
    current->predicate = predicate;
    wait(AT_BLOCK_BARRIER, what, file, line);
    if (vote == 1) return launch.votes;
    return vote == 2 ? launch.votes == (int)launch.threads : launch.votes > 0;
}

void emulated_exchange(const char* what, unsigned mask, const void* value, void* result, unsigned size, int source,
                       const char* file, int line) {
    if (size > sizeof current->given) fail(nullptr, "%s of %u bytes at %s:%d", what, size, file, line);
    if (size > 0) memcpy(current->given, value, size);
    exchange(what, mask, source, 0, file, line);
    if (size > 0) memcpy(result, current->received, size);
}

unsigned emulated_ballot(const char* what, unsigned mask, int predicate, const char* file, int line) {
    exchange(what, mask, -1, predicate, file, line);
    return current->votes;
}

void emulated_atomic(const void* p, size_t size, const void* pc) { access(p, size, true, pc, true); }

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize=thread calls

#define ACCESS(name, size, write) \
    void name(void* p) { access(p, size, write, __builtin_return_address(0)); }
#define ACCESSES(size)                              \
    ACCESS(__tsan_read##size, size, false)          \
    ACCESS(__tsan_write##size, size, true)          \
    ACCESS(__tsan_unaligned_read##size, size, false) \
    ACCESS(__tsan_unaligned_write##size, size, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize=undefined calls, each with data that begin with the place in the source

struct Place {
    const char* file;
    unsigned line, column;
};
struct Mismatch {
    Place place;
    const void* type;
    unsigned char log_alignment, kind;
};

void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t p) {
    if ((p & ((1ull << data->log_alignment) - 1)) == 0)
        fail(nullptr, "null pointer at %s:%u", data->place.file, data->place.line);
    fail(nullptr, "misaligned: address %#llx is no multiple of %u at %s:%u", (unsigned long long)p,
         1u << data->log_alignment, data->place.file, data->place.line);
}
void __ubsan_handle_out_of_bounds(Place* place, uintptr_t index) {
    fail(nullptr, "out of bounds: index %lld of an array at %s:%u", (long long)index, place->file, place->line);
}
#define HANDLER(name, text) \
    void __ubsan_handle_##name(Place* place) { fail(nullptr, text " at %s:%u", place->file, place->line); }
HANDLER(add_overflow, "integer overflow in an addition")
HANDLER(sub_overflow, "integer overflow in a subtraction")
HANDLER(mul_overflow, "integer overflow in a multiplication")
HANDLER(negate_overflow, "integer overflow in a negation")
HANDLER(divrem_overflow, "integer division by zero or overflow")
HANDLER(shift_out_of_bounds, "shift out of bounds")
HANDLER(load_invalid_value, "a bool or enum that holds no such value")
HANDLER(missing_return, "end of a function that returns a value")
HANDLER(builtin_unreachable, "unreachable place reached")

}  // extern "C"
