// The threads of a block as fibers: see cuda_on_cpu.h.
//
// A fiber is started once with makecontext and then switched to and from with _setjmp and _longjmp, which make no
// system call. When a kernel returns its fiber waits for the next thread to run, so that fibers are made once a
// process; only those that a fault left in the middle of a kernel are made anew.

// Nothing here needs the library of C++: it would have to be built first where ziglang is the compiler.

// The checked longjmp takes another stack for a mistake.
#undef _FORTIFY_SOURCE

#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "cuda_on_cpu.h"
#include "float_mode.h"

extern char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

namespace cuda_on_cpu {

Place place;

namespace {

constexpr unsigned MOST_THREADS = 1024;
constexpr std::size_t STACK = 64 << 10;

enum State { READY, AT_BARRIER, AT_LANES, DONE };

struct Thread {
    State state;
    bool is_inside;  // of a kernel, in `at`
    bool is_made;    // waits in `at` for a kernel
    jmp_buf at;
    ucontext_t start;
    uint3 index;
    // what it waits for
    int line;
    unsigned mask, source;
    unsigned long long value, result;
};

// The lanes at a shuffle, and those that have ended or never were.
struct Warp {
    unsigned waiting, ended;
};

Thread threads[MOST_THREADS];
Warp warps[MOST_THREADS / LANES];
char* stacks;
jmp_buf scheduler, launcher;
Thread* running;

// The block that runs.
unsigned count, left, arrived;
bool is_open;
void (*kernel)(void**);
void** kernel_arguments;
unsigned warp_order[MOST_THREADS / LANES], lane_order[LANES];
unsigned* block_order;

int order;
char* message;
std::size_t message_size;

unsigned long long random_state;

unsigned random_below(unsigned limit) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random_state >> 33) * limit >> 31);
}

// Orders of 0, 1, ...: 0 forward, 1 backward, 2 shuffled (Fisher and Yates).
void arrange(unsigned* order, unsigned size, int kind) {
    for (unsigned i = 0; i < size; i++) order[i] = kind == 1 ? size - 1 - i : i;
    for (unsigned i = size; kind == 2 && i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

void leave(Thread& self) {
    if (_setjmp(self.at) == 0) _longjmp(scheduler, 1);
}

void live() {
    for (;;) {
        Thread& self = *running;
        self.is_inside = true;
        kernel(kernel_arguments);
        self.is_inside = false;
        self.state = DONE;
        leave(self);
    }
}

void make(Thread& thread) {
    std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    std::size_t place_of_one = STACK + page;
    if (!stacks) {
        void* memory = mmap(
            nullptr, place_of_one * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            -1, 0);
        if (memory == MAP_FAILED) fault(0, "no memory for the stacks of the fibers");
        stacks = static_cast<char*>(memory);
    }
    char* lowest = stacks + place_of_one * static_cast<std::size_t>(&thread - threads);
    // a kernel that needs more stack than there is stops here
    if (mprotect(lowest, page, PROT_NONE) != 0) fault(0, "the stack of a fiber cannot be guarded");
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = lowest + page;
    thread.start.uc_stack.ss_size = STACK;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, live, 0);
    thread.is_made = true;
}

void resume(Thread& thread) {
    running = &thread;
    place.thread = thread.index;
    place.lane = static_cast<unsigned>(&thread - threads) % LANES;
    bool is_new = !thread.is_made;
    if (is_new) make(thread);
    if (_setjmp(scheduler) != 0) return;
    if (is_new) setcontext(&thread.start);
    _longjmp(thread.at, 1);
}

unsigned number(const Thread& thread) { return static_cast<unsigned>(&thread - threads); }

const char* name_of(State state) { return state == AT_BARRIER ? "__syncthreads" : "a shuffle"; }

// Lets the lanes that `first` waits for go on, with their results, if all that have not ended have come.
void try_exchange(Warp& warp, const Thread& first) {
    if ((first.mask & ~(warp.waiting | warp.ended)) != 0) return;
    Thread* lanes = threads + number(first) / LANES * LANES;
    unsigned come = first.mask & warp.waiting;
    for (unsigned i = 0; i < LANES; i++) {
        if (!(come >> i & 1u)) continue;
        const Thread& lane = lanes[i];
        if (lane.mask != first.mask || lane.line != first.line) {
            fault(first.line, "thread %u shuffles with lanes %08x, and thread %u in line %d with %08x", number(first),
                first.mask, number(lane), lane.line, lane.mask);
        }
        if (lane.source >= LANES || !(come >> lane.source & 1u)) {
            fault(lane.line, "thread %u shuffles from lane %u, which takes no part", number(lane), lane.source);
        }
    }
    for (unsigned i = 0; i < LANES; i++) {
        if (!(come >> i & 1u)) continue;
        lanes[i].result = lanes[lanes[i].source].value;
        lanes[i].state = READY;
    }
    warp.waiting &= ~come;
}

void end(const Thread& self) {
    Warp& warp = warps[number(self) / LANES];
    warp.ended |= 1u << number(self) % LANES;
    // lanes may have waited for this one alone
    for (unsigned i = 0; i < LANES && warp.waiting; i++) {
        const Thread& lane = threads[number(self) / LANES * LANES + i];
        if (warp.waiting >> i & lane.mask >> number(self) % LANES & 1u) try_exchange(warp, lane);
    }
}

void open_barrier() {
    const Thread* first = nullptr;
    for (unsigned i = 0; i < count; i++) {
        if (first && threads[i].line != first->line) {
            fault(first->line, "thread %u waits at __syncthreads, and thread %u at that of line %d", number(*first), i,
                threads[i].line);
        }
        first = &threads[i];
    }
    for (unsigned i = 0; i < count; i++) threads[i].state = READY;
    arrived = 0;
    is_open = true;
}

// A deadlock: report which threads wait for which.
[[noreturn]] void explain_standstill() {
    const Thread *waiting = nullptr, *other = nullptr;
    for (unsigned i = 0; i < count; i++) {
        if (threads[i].state != DONE && !waiting) waiting = &threads[i];
    }
    for (unsigned i = 0; i < count; i++) {
        const Thread& thread = threads[i];
        bool differs = thread.state != waiting->state || thread.line != waiting->line;
        if (differs && (!other || (other->state == DONE && thread.state != DONE))) other = &thread;
    }
    const char* where = name_of(waiting->state);
    unsigned who = number(*waiting);
    if (!other) fault(waiting->line, "thread %u waits at %s for threads that never come", who, where);
    if (other->state == DONE) {
        fault(waiting->line, "thread %u waits at %s, and thread %u has ended", who, where, number(*other));
    }
    fault(waiting->line, "thread %u waits at %s, and thread %u at %s of line %d",
        who, where, number(*other), name_of(other->state), other->line);
}

// A warp runs until all of its lanes have ended or wait for the block. It gets as far ahead as possible, so that the
// other warps see values that it writes too early. The warp that opens a barrier does not continue first.
bool run_warp(unsigned warp) {
    bool moved = false;
    for (bool moves = true; moves && !is_open;) {
        moves = false;
        for (unsigned i : lane_order) {
            Thread& thread = threads[warp * LANES + i];
            if (warp * LANES + i >= count || thread.state != READY || is_open) continue;
            moved = moves = true;
            resume(thread);
            if (thread.state != DONE) continue;
            left--;
            end(thread);
        }
    }
    return moved;
}

void run_block() {
    unsigned warp_count = (count + LANES - 1) / LANES;
    std::size_t statics = static_cast<std::size_t>(__stop_cuda_shared - __start_cuda_shared);
    if (statics) std::memset(__start_cuda_shared, 0xff, statics);
    for (unsigned i = 0; i < count; i++) {
        Thread& thread = threads[i];
        if (thread.is_inside) thread.is_made = thread.is_inside = false;
        thread.state = READY;
        thread.index = {i % place.threads.x, i / place.threads.x % place.threads.y,
                        i / (place.threads.x * place.threads.y)};
    }
    for (unsigned i = 0; i < warp_count; i++) {
        unsigned lanes = count - i * LANES;
        warps[i] = {0, lanes < LANES ? ~0u << lanes : 0};
    }
    arrived = 0;
    left = count;
    while (left) {
        bool moves = false;
        arrange(warp_order, warp_count, order);
        arrange(lane_order, LANES, order);
        is_open = false;
        for (unsigned i = 0; i < warp_count && !is_open; i++) moves |= run_warp(warp_order[i]);
        if (!moves) explain_standstill();
    }
}

}  // namespace

void fault(int line, const char* format, ...) {
    int length = std::snprintf(message, message_size, "%d ", line);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + length, message_size - static_cast<std::size_t>(length), format, arguments);
    va_end(arguments);
    _longjmp(launcher, 1);
}

void meet_block(int line) {
    Thread& self = *running;
    self.line = line;
    self.state = AT_BARRIER;
    if (++arrived == count) open_barrier();
    leave(self);
}

unsigned long long meet_lanes(int line, unsigned mask, unsigned long long value, unsigned source) {
    Thread& self = *running;
    if (!(mask >> place.lane & 1u)) fault(line, "lane %u shuffles with lanes %08x, without itself", place.lane, mask);
    self.line = line;
    self.mask = mask;
    self.value = value;
    self.source = source;
    self.state = AT_LANES;
    Warp& warp = warps[number(self) / LANES];
    warp.waiting |= 1u << place.lane;
    try_exchange(warp, self);
    if (self.state == AT_LANES) leave(self);
    return self.result;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

// Runs blocks of threads in a given order; an empty string in `text`, or the line and what is wrong with it.
extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_launch(
    void (*call)(void**), void** arguments, const dim3* blocks, const dim3* block_size, int kind, unsigned long long seed, int flushes, char* text, std::size_t text_size) {
    message = text;
    message_size = text_size;
    text[0] = 0;
    kernel = call;
    kernel_arguments = arguments;
    order = kind;
    place.blocks = *blocks;
    place.threads = *block_size;
    count = block_size->x * block_size->y * block_size->z;
    random_state = seed;
    static unsigned long long mode;
    mode = float_mode();
    set_float_mode(flushes ? mode | FLUSHES : mode);
    if (_setjmp(launcher) != 0) {
        set_float_mode(mode);
        return;
    }
    if (count == 0 || count > MOST_THREADS) fault(0, "a block has 1 to %u threads, not %u", MOST_THREADS, count);
    unsigned size = blocks->x * blocks->y * blocks->z;
    block_order = static_cast<unsigned*>(std::realloc(block_order, size * sizeof(unsigned)));
    if (!block_order) fault(0, "no memory for the order of %u blocks", size);
    arrange(block_order, size, kind);
    for (unsigned at = 0; at < size; at++) {
        unsigned i = block_order[at];
        place.block = {i % blocks->x, i / blocks->x % blocks->y, i / (blocks->x * blocks->y)};
        run_block();
    }
    set_float_mode(mode);
}
