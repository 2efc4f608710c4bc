// Runs the blocks of a grid one after the other, every thread a fibre, and watches every access to memory.
//
// Kernels are compiled with -fsanitize=thread and parts of -fsanitize=undefined. The compiler then calls __tsan_read4
// and its like before each access, and __ubsan_handle_... where an access is misaligned, an index beyond an array and so
// on. Nothing of the sanitizers' own libraries is linked: these functions are defined here.
//
// An error ends the launch: the message is kept, and all fibres are abandoned.
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
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
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
    bool operator<(const Site& other) const {
        return std::make_pair(std::string(file), line) < std::make_pair(std::string(other.file), other.line);
    }
};

struct Thread {
    jmp_buf context;
    char* stack = nullptr;
    bool started = false;
    Index index;
    unsigned number;        // in the block
    State state;
    Site site;              // where it waits
    unsigned mask;          // whom it waits for
    uint64_t value[2][2];   // handed in: of this exchange and of the one before, which slower lanes may still read
    unsigned exchanges;     // so many of its warp have it behind
    int predicate;
};

constexpr size_t STACK = 128 << 10;

std::vector<std::unique_ptr<Thread>> pool;  // threads of a block, kept from launch to launch
Thread* current = nullptr;
uintptr_t stack_begin;      // of the current thread
jmp_buf scheduler;
std::mt19937_64 order;

// ---------------------------------------------------------------------------------------------------------------------
// The launch

struct Range {              // memory that the kernel may touch
    uintptr_t begin, end;
    unsigned char* initialised;  // a flag for each byte
    uint64_t granule;       // bytes that are touched together: the size of an element
    const char* name;
};

struct Result {
    uint64_t bytes_read, bytes_written;
    const void* pc;         // of the error, where its place is not in the message
    char message[2000];
};

struct Access {
    uint32_t thread;        // in the grid, from 1; 0 for nobody
    uint32_t barriers;      // of the block that the thread had behind it
    uint32_t exchanges;     // of the warp
};

struct History {            // of a granule
    Access write, read, other_read;  // the last ones; other_read is by another thread than read
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    Index grid, block;
    unsigned threads;
    std::vector<Range> ranges;
    std::vector<History*> histories;  // made at the first access
    size_t last_range = 0;
    uintptr_t shared_begin, shared_end, dynamic_begin, dynamic_end;
    std::vector<unsigned char> shared_initialised;
    std::vector<History> shared_history;
    Index block_index;
    uint32_t first_thread;  // of the block in the grid, from 1
    uint32_t barriers;      // passed by the block
    int votes;
    Result* result;
};
Launch launch;

[[noreturn]] void fail(const void* pc, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch.result->message, sizeof launch.result->message, format, arguments);
    va_end(arguments);
    launch.result->pc = pc;
    _longjmp(scheduler, 2);
}

std::string describe(uint32_t thread) {
    const uint32_t block = (thread - 1) / launch.threads, number = (thread - 1) % launch.threads;
    char text[100];
    snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", number, block % launch.grid.x,
             block / launch.grid.x % launch.grid.y, block / launch.grid.x / launch.grid.y);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// Whether what was done is known to lie before what is done now.
bool ordered(const Access& before, const Access& now, bool same_memory_for_all_blocks) {
    if (before.thread == 0 || before.thread == now.thread) return true;
    if ((before.thread - 1) / launch.threads != (now.thread - 1) / launch.threads) return !same_memory_for_all_blocks;
    if (before.barriers < now.barriers) return true;
    const bool same_warp = (before.thread - launch.first_thread) / 32 == (now.thread - launch.first_thread) / 32;
    return same_warp && before.exchanges < now.exchanges;
}

void check_race(History& history, bool write, bool global, const char* name, const void* pc) {
    const Access now = {launch.first_thread + current->number, launch.barriers, current->exchanges};
    const Access* before = nullptr;
    if (!ordered(history.write, now, global)) before = &history.write;
    if (write && !ordered(history.read, now, global)) before = &history.read;
    if (write && !ordered(history.other_read, now, global)) before = &history.other_read;
    if (before)
        fail(pc, "race on %s: %s %s what %s has %s, with no barrier between them", name, describe(now.thread).c_str(),
             write ? "writes" : "reads", describe(before->thread).c_str(),
             before == &history.write ? "written" : "read");
    if (write) {
        history = {now, {}, {}};
    } else {
        if (history.read.thread != now.thread) history.other_read = history.read;
        history.read = now;
    }
}

void access_shared(uintptr_t address, size_t size, bool write, const void* pc) {
    if (address + size > launch.shared_end || (address + size > launch.dynamic_end && address >= launch.dynamic_begin))
        fail(pc, "out of bounds: %zu bytes %s past the end of shared memory", size, write ? "written" : "read");
    const size_t offset = address - launch.shared_begin;
    for (size_t i = offset; i < offset + size; i++) {
        if (write)
            launch.shared_initialised[i] = 1;
        else if (!launch.shared_initialised[i])
            fail(pc, "uninitialised: %zu bytes of shared memory read that nobody has written", size);
        check_race(launch.shared_history[i], write, false, "shared memory", pc);
    }
}

void access_global(uintptr_t address, size_t size, bool write, const void* pc, bool atomic) {
    size_t i = launch.last_range;
    if (i >= launch.ranges.size() || address < launch.ranges[i].begin || address + size > launch.ranges[i].end) {
        for (i = 0; i < launch.ranges.size(); i++)
            if (launch.ranges[i].begin <= address && address + size <= launch.ranges[i].end) break;
        if (i == launch.ranges.size()) {
            std::string nearest = "no argument is near";
            uintptr_t least = 1 << 20;
            for (const Range& range : launch.ranges) {
                const uintptr_t before = range.begin - address, after = address - range.end;
                char text[200];
                if (address < range.begin && before < least) {
                    least = before;
                    snprintf(text, sizeof text, "%zu bytes before the begin of %s", (size_t)before, range.name);
                    nearest = text;
                }
                if (address + size > range.end && address >= range.begin && after + size < least + size) {
                    least = after;
                    snprintf(text, sizeof text, "%zu bytes past the end of %s", (size_t)(address + size - range.end),
                             range.name);
                    nearest = text;
                }
            }
            fail(pc, "out of bounds: %zu bytes %s (%s)", size, write ? "written" : "read", nearest.c_str());
        }
        launch.last_range = i;
    }
    const Range& range = launch.ranges[i];
    const size_t offset = address - range.begin;
    (write ? launch.result->bytes_written : launch.result->bytes_read) += size;
    if (write)
        memset(range.initialised + offset, 1, size);
    else
        for (size_t k = 0; k < size; k++)
            if (!range.initialised[offset + k])
                fail(pc, "uninitialised: %zu bytes of %s read that nobody has written", size, range.name);
    if (atomic) return;
    if (!launch.histories[i])
        launch.histories[i] =
            (History*)calloc((range.end - range.begin + range.granule - 1) / range.granule, sizeof(History));
    for (size_t k = offset / range.granule; k * range.granule < offset + size; k++)
        check_race(launch.histories[i][k], write, true, range.name, pc);
}

inline void access(const void* p, size_t size, bool write, const void* pc) {
    const uintptr_t address = (uintptr_t)p;
    if (address - stack_begin < STACK) return;  // the thread's own variables
    if (launch.shared_begin <= address && address < launch.shared_end)
        access_shared(address, size, write, pc);
    else
        access_global(address, size, write, pc, false);
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
    current = &thread;
    stack_begin = (uintptr_t)thread.stack;
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = thread.stack;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
    abort();
}

void wait(State state, const char* what, const char* file, int line) {
    current->state = state;
    current->site = {what, file, line};
    if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}

unsigned warp_size(unsigned warp) { return std::min(32u, launch.threads - warp * 32); }

// Lets the lanes go on that have all arrived whom they wait for.
void release_warp(unsigned warp, std::vector<Thread*>& ready) {
    const unsigned present = warp_size(warp) == 32 ? ~0u : (1u << warp_size(warp)) - 1;
    const unsigned mask = current->mask & present;
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) {
            const Thread& thread = *pool[warp * 32 + lane];
            if (thread.state != AT_WARP_BARRIER) return;
            if (thread.mask != current->mask || strcmp(thread.site.what, current->site.what) != 0)
                fail(nullptr, "lanes disagree: %s with mask %08x at %s:%d, %s with mask %08x at %s:%d",
                     current->site.what, current->mask, current->site.file, current->site.line, thread.site.what,
                     thread.mask, thread.site.file, thread.site.line);
        }
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) {
            Thread& thread = *pool[warp * 32 + lane];
            thread.state = READY;
            thread.exchanges++;
            ready.push_back(&thread);
        }
}

void release_block(std::vector<Thread*>& ready) {
    int count = 0;
    for (unsigned i = 0; i < launch.threads; i++) {
        const Thread& thread = *pool[i];
        if (thread.site.line != pool[0]->site.line || strcmp(thread.site.file, pool[0]->site.file) != 0)
            fail(nullptr, "different barriers: thread 0 waits at %s:%d, thread %u at %s:%d", pool[0]->site.file,
                 pool[0]->site.line, i, thread.site.file, thread.site.line);
        count += thread.predicate != 0;
    }
    launch.votes = count;
    launch.barriers++;
    for (unsigned i = 0; i < launch.threads; i++) {
        pool[i]->state = READY;
        ready.push_back(pool[i].get());
    }
}

[[noreturn]] void report_deadlock() {
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
    fail(nullptr, "deadlock: of %u threads of block (%u, %u, %u)%s", launch.threads, launch.block_index.x,
         launch.block_index.y, launch.block_index.z, text.c_str());
}

void shuffle(std::vector<Thread*>& threads) {
    for (size_t i = threads.size(); i > 1; i--) std::swap(threads[i - 1], threads[order() % i]);
}

void run_block() {
    memset((void*)launch.shared_begin, 0xff, launch.shared_end - launch.shared_begin);
    std::fill(launch.shared_initialised.begin(), launch.shared_initialised.end(), 0);
    launch.barriers = 0;
    static std::vector<Thread*> ready, round;  // static: a jump over them loses nothing
    static size_t i;
    static unsigned at_barrier, done;
    ready.clear();
    at_barrier = done = 0;
    for (unsigned n = 0; n < launch.threads; n++) {
        Thread& thread = *pool[n];
        thread.number = n;
        thread.index = {n % launch.block.x, n / launch.block.x % launch.block.y, n / launch.block.x / launch.block.y};
        thread.state = READY;
        thread.exchanges = 0;
        ready.push_back(&thread);
    }
    while (!ready.empty()) {
        round.swap(ready);
        ready.clear();
        shuffle(round);
        for (i = 0; i < round.size(); i++) {
            const int back = _setjmp(scheduler);
            if (back == 0) resume(*round[i]);
            if (back == 2) return;
            if (current->state == AT_WARP_BARRIER) {
                if (_setjmp(scheduler) == 2) return;
                release_warp(current->number / 32, ready);
            } else if (current->state == DONE) {
                done++;
            } else if (++at_barrier == launch.threads) {
                if (_setjmp(scheduler) == 2) return;
                at_barrier = 0;
                release_block(ready);
            }
        }
    }
    if (done < launch.threads) {
        if (_setjmp(scheduler) == 2) return;
        report_deadlock();
    }
}

}  // namespace

extern "C" {

// The message of the result is empty if all went well.
void emulated_launch(void (*entry)(void**), void** arguments, const unsigned* grid, const unsigned* block, char* shared_begin,
                     char* shared_end, char* dynamic_begin, size_t dynamic_size, const Range* ranges, int range_count,
                     uint64_t seed, int flush_denormals, Result* result) {
    memset(result, 0, sizeof *result);
    launch.entry = entry;
    launch.arguments = arguments;
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.threads = block[0] * block[1] * block[2];
    launch.ranges.assign(ranges, ranges + range_count);
    launch.histories.assign(range_count, nullptr);
    launch.shared_begin = (uintptr_t)shared_begin;
    launch.shared_end = (uintptr_t)shared_end;
    launch.dynamic_begin = dynamic_begin ? (uintptr_t)dynamic_begin : (uintptr_t)shared_end;
    launch.dynamic_end = launch.dynamic_begin + dynamic_size;
    launch.shared_initialised.assign(shared_end - shared_begin, 0);
    launch.shared_history.assign(shared_end - shared_begin, History{});
    launch.result = result;
    order.seed(seed);
    while (pool.size() < launch.threads) {
        pool.emplace_back(new Thread());
        pool.back()->stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
#if defined(__SSE__)
    const unsigned rounding = _mm_getcsr();
    if (flush_denormals) _mm_setcsr(rounding | 0x8040);
#endif
    std::vector<uint32_t> blocks(grid[0] * grid[1] * grid[2]);
    for (uint32_t b = 0; b < blocks.size(); b++) blocks[b] = b;
    for (size_t b = blocks.size(); b > 1; b--) std::swap(blocks[b - 1], blocks[order() % b]);
    for (uint32_t b : blocks) {
        launch.block_index = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        launch.first_thread = b * launch.threads + 1;
        run_block();
        if (result->message[0]) {
            for (auto& thread : pool) thread->started = false;  // where they are, they stay
            break;
        }
    }
#if defined(__SSE__)
    _mm_setcsr(rounding);
#endif
    for (History* history : launch.histories) free(history);
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
    const unsigned lane = current->number % 32, warp = current->number / 32, slot = current->exchanges % 2;
    if (!(mask >> lane & 1)) fail(nullptr, "%s with mask %08x, which lacks lane %u, at %s:%d", what, mask, lane, file, line);
    if (size > sizeof current->value[0]) fail(nullptr, "%s of %u bytes at %s:%d", what, size, file, line);
    memcpy(current->value[slot], value, size);
    current->mask = mask;
    wait(AT_WARP_BARRIER, what, file, line);
    if (source < 0) return;
    if ((unsigned)source >= warp_size(warp) || !(mask >> source & 1))
        fail(nullptr, "%s from lane %d, which is not in mask %08x, at %s:%d", what, source, mask, file, line);
    memcpy(result, pool[warp * 32 + source]->value[slot], size);
}

unsigned emulated_ballot(const char* what, unsigned mask, int predicate, const char* file, int line) {
    const unsigned warp = current->number / 32, slot = current->exchanges % 2;
    emulated_exchange(what, mask, &predicate, nullptr, sizeof predicate, -1, file, line);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < warp_size(warp); lane++) {
        int other;
        memcpy(&other, pool[warp * 32 + lane]->value[slot], sizeof other);
        if (mask >> lane & 1) votes |= (unsigned)(other != 0) << lane;
    }
    return votes;
}

void emulated_atomic(const void* p, size_t size) {
    const uintptr_t address = (uintptr_t)p;
    if (launch.shared_begin <= address && address < launch.shared_end) {
        const size_t offset = address - launch.shared_begin;
        for (size_t i = 0; i < size; i++)
            if (!launch.shared_initialised[offset + i])
                fail(__builtin_return_address(0), "uninitialised: an atomic on shared memory that nobody has written");
        return;
    }
    access_global(address, size, false, __builtin_return_address(0), true);
    access_global(address, size, true, __builtin_return_address(0), true);
}

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
        fail(nullptr, "null pointer or object too small at %s:%u", data->place.file, data->place.line);
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
HANDLER(float_cast_overflow, "a float beyond the range of the integer that it becomes")

}  // extern "C"
