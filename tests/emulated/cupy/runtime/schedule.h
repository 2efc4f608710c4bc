// The order in which threads run: threads are fibres, barriers stop them, and the blocks of a cluster take turns.
#pragma once
#include <map>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "access.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Fibres

void run_thread() {
    for (;;) {
        launch.entry(launch.arguments);
        if (!current->copies.empty()) fail(current->copies[0].pc, "left while copies are still on their way");
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
    // Stacks of different lengths, or the frames of all threads would lie in the same lines of the cache.
    start.uc_stack.ss_size = STACK - thread.number % 128 * 576;
    start.uc_link = nullptr;
    makecontext(&start, run_thread, 0);
    setcontext(&start);
    abort();
}

// Runs a thread until it waits. This is a function of its own, without variables, as a jump could lose their values.
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

// ---------------------------------------------------------------------------------------------------------------------
// Barriers of a warp

unsigned warp_size(unsigned warp) { return std::min(32u, launch.threads - warp * 32); }

// Makes the current thread wait for the lanes of mask, and then get the value of lane source.
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

// Lets the lanes that the current thread waits for go on, if all of them have arrived.
void release_warp() {
    const unsigned warp = current->number / 32, size = warp_size(warp);
    const unsigned mask = current->mask & (size == 32 ? ~0u : (1u << size) - 1);
    Thread* lanes[32];
    for (unsigned lane = 0; lane < size; lane++) {
        lanes[lane] = block->threads[warp * 32 + lane].get();
        // A lane that waits with another mask may come here later, when that one's lanes have met.
        if (mask >> lane & 1 && (lanes[lane]->state != AT_WARP_BARRIER || lanes[lane]->mask != current->mask)) return;
    }
    const Site& here = current->site;
    uint32_t seen[32] = {};
    unsigned votes = 0;
    uint32_t known = 0;
    for (unsigned lane = 0; lane < size; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Thread& thread = *lanes[lane];
        const Site& there = thread.site;
        // Lanes may meet in different __syncwarp; functions that move values must be the same call for all lanes.
        if (!same_text(there.what, here.what) ||
            (!there.same_place(here) && strcmp(here.what, "__syncwarp") != 0))
            return report("lanes disagree: of mask %08x, one is in %s at %s:%d, another in %s at %s:%d", mask, here.what,
                          here.file, here.line, there.what, there.file, there.line);
        known = std::max(known, thread.known);
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
        lanes[lane]->known = known;
        lanes[lane]->state = READY;
        lanes[lane]->votes = votes;
        const int source = lanes[lane]->source;  // moved now, as other lanes may soon hand in their next values
        if (source >= 0) memcpy(lanes[lane]->received, lanes[source]->given, sizeof lanes[lane]->received);
        block->ready.push_back(lanes[lane]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Barriers of a block and of a cluster

// Lets all threads of the block go on, which are at its barrier.
void release_block() {
    const Site& first = block->threads[0]->site;
    uint32_t known = 0;
    block->votes = 0;
    for (unsigned i = 0; i < launch.threads; i++) {
        const Thread& thread = *block->threads[i];
        if (!thread.site.same_place(first))
            return report("different barriers: thread 0 waits at %s:%d, thread %u at %s:%d", first.file, first.line, i,
                          thread.site.file, thread.site.line);
        block->votes += thread.predicate != 0;
        block->barrier = std::max(block->barrier, thread.epoch + 1);
        known = std::max(known, thread.known);
    }
    for (unsigned i = 0; i < launch.threads; i++) {
        Thread& thread = *block->threads[i];
        thread.state = READY;
        thread.epoch = block->barrier;
        thread.known = known;
        block->ready.push_back(&thread);
    }
}

// Arrives at the cluster's barrier. All that this thread did so far, and all that earlier barriers have put before
// that, lies before the arrival; what the thread does from here until it waits does not. A relaxed arrival releases
// nothing: it says that the thread has come, and puts nothing before it.
void arrive(const char* what, bool releases, const char* file, int line) {
    if (current->arrived) fail(nullptr, "%s twice with no __cluster_barrier_wait between, at %s:%d", what, file, line);
    ++current->epoch;
    if (releases) {
        const unsigned warp = current->number / 32;
        for (unsigned lane = 0; lane < warp_size(warp); lane++) {
            Thread& thread = *block->threads[warp * 32 + lane];
            thread.releasing = std::max(thread.releasing, current->seen[lane]);
        }
        block->releasing = block->barrier;
        current->releasing = current->epoch;
    }
    current->arrived = true;
    current->arrival = launch.phase;
    launch.arrived++;
}

void wait_for_cluster(const char* file, int line) {
    if (!current->arrived)
        fail(nullptr, "__cluster_barrier_wait with no __cluster_barrier_arrive before, at %s:%d", file, line);
    if (current->arrival == launch.phase) wait(AT_CLUSTER_BARRIER, "__cluster_barrier_wait", file, line);
    current->arrived = false;
    current->known = launch.phase;
}

// Ends the cluster's barrier: lets the threads that wait go on, and those that have arrived but do not wait yet.
void release_cluster() {
    launch.arrived = 0;
    launch.phase++;
    for (Block& of_cluster : launch.blocks)
        for (unsigned i = 0; i < launch.threads; i++) {
            Thread& thread = *of_cluster.threads[i];
            thread.released_before = thread.released;
            thread.released = std::max(thread.releasing, of_cluster.releasing);
            if (thread.state != AT_CLUSTER_BARRIER) continue;
            thread.state = READY;
            of_cluster.ready.push_back(&thread);
        }
}

void report_deadlock() {
    std::map<Site, int> waiting;
    int left = 0;
    for (unsigned i = 0; i < launch.cluster_threads; i++)
        if (pool[i]->state == DONE)
            left++;
        else
            waiting[pool[i]->site]++;
    std::string text;
    for (const auto& entry : waiting)
        text += ", " + std::to_string(entry.second) + " wait in " + entry.first.what + " at " + entry.first.file + ":" +
                std::to_string(entry.first.line);
    if (left) text += ", " + std::to_string(left) + " have left";
    report("deadlock: of %u threads of %s%s%s", launch.cluster_threads,
           launch.blocks.size() > 1 ? "the cluster that begins with " : "", describe(launch.blocks[0]).text,
           text.c_str());
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks and clusters

void start_block(Block& starting, uint32_t number) {
    const unsigned row = number / launch.grid.x;
    starting.index = {number % launch.grid.x, row % launch.grid.y, row / launch.grid.y};
    starting.first_thread = number * launch.threads + 1;
    starting.at_barrier = starting.done = 0;
    starting.barrier = starting.releasing = 0;
    if (launch.blocks.size() > 1) starting.visits.assign(launch.cluster_threads, {});
    for (unsigned n = 0; n < launch.threads; n++) {
        Thread& thread = *starting.threads[n];
        thread.number = n;
        thread.index = {n % launch.block.x, n / launch.block.x % launch.block.y, n / launch.block.x / launch.block.y};
        thread.state = READY;
        thread.epoch = 0;
        memset(thread.seen, 0, sizeof thread.seen);
        thread.arrived = false;
        thread.known = thread.releasing = thread.released = thread.released_before = 0;
        thread.copies.clear();
        thread.groups = 0;
        starting.ready.push_back(&thread);
    }
}

// Calls f for each part of shared memory that the launch uses.
template <class F>
void for_each_part(F f) {
    if (launch.dynamic_begin == 0) return f(launch.shared_begin, launch.shared_end);
    f(launch.shared_begin, launch.dynamic_begin);
    f(launch.dynamic_begin, launch.dynamic_end);
    f(launch.dynamic_limit, launch.shared_end);
}

// Gives the turn to a block: moves its shared memory from its image to the place where kernels have it.
void turn_to(Block& next) {
    if (block == &next) return;
    for_each_part([&](uintptr_t begin, uintptr_t end) {
        memcpy(in_image(*block, begin), (void*)begin, end - begin);
        memcpy((void*)begin, in_image(next, begin), end - begin);
    });
    block = &next;
}

// Runs the threads of the block until none of them can go on.
void run_turn() {
    while (!block->ready.empty()) {
        launch.round.swap(block->ready);
        block->ready.clear();
        shuffle(launch.round);
        for (Thread* thread : launch.round) {
            run_until_it_waits(*thread);
            if (failed()) return;
            if (thread->state == AT_WARP_BARRIER) {
                release_warp();
            } else if (thread->state == DONE) {
                if (++block->done == launch.threads) check_visits(*block);
            } else if (thread->state == AT_BLOCK_BARRIER && ++block->at_barrier == launch.threads) {
                block->at_barrier = 0;
                release_block();
            }
            if (launch.arrived == launch.cluster_threads) release_cluster();
            if (failed()) return;
        }
    }
}

// Runs the blocks of a cluster, which begins with the given one.
void run_cluster(uint32_t first) {
    launch.first_thread = first * launch.threads + 1;
    launch.arrived = 0;
    launch.phase = 0;
    for (Block& starting : launch.blocks) start_block(starting, first++);
    for (;;) {
        launch.turns.clear();
        for (Block& of_cluster : launch.blocks)
            if (!of_cluster.ready.empty()) launch.turns.push_back(&of_cluster);
        if (launch.turns.empty()) break;
        shuffle(launch.turns);
        for (Block* next : launch.turns) {
            turn_to(*next);
            run_turn();
            if (failed()) return;
        }
    }
    for (const Block& of_cluster : launch.blocks)
        if (of_cluster.done < launch.threads) return report_deadlock();
}

// Allocates a stack, with a page below it that must not be touched.
char* new_stack() {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, guard + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) abort();
    return (char*)memory + guard;
}

}  // namespace
