// Runs CUDA kernels on the CPU, to check them where there is no GPU. It says nothing about speed.
//
// Every CUDA thread is a fiber. Blocks run one after another; the threads of a block run one at a time, in a chosen
// order, each until it waits at a barrier or a shuffle. What is reported, with block, thread and place:
//   - a barrier or shuffle that not all threads reach, or that they reach in different places;
//   - races: two threads touch one shared word between two barriers and one of them writes (exact for this program,
//     whatever the order of threads, because barriers are all that orders shared memory here); two threads of a launch
//     write one word of global memory, or one reads what another writes;
//   - shared or global accesses outside their array, vector accesses that are not aligned, shared words that are read
//     before they are written, more static shared memory than 48 KiB, a block size that differs from the launch bound.
// Not covered: inline PTX, cp.async, tensor cores, cooperative groups, blocks that run at the same time.
#pragma once
#define CUDA_EMULATOR

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulator::block.thread_index)
#define blockIdx (emulator::block.block_index)
#define __syncthreads() emulator::wait_at_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, step) emulator::shuffle_xor(mask, value, step, __LINE__)
#define SHARED_FLOATS(name, count) const emulator::SharedFloats name = emulator::shared_array(#name, count)
#define NEGATIVE_INFINITY (-std::numeric_limits<float>::infinity())
#define POSITIVE_INFINITY (std::numeric_limits<float>::infinity())

using std::max;
using std::min;

namespace emulator {

constexpr int WARP = 32, STACK_BYTES = 512 * 1024, SHARED_LIMIT = 48 * 1024, NOBODY = -1, SEVERAL = -2;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct SharedCell {
    float value = std::numeric_limits<float>::quiet_NaN();
    bool written = false;
    int write_epoch = -1, writer = NOBODY, read_epoch = -1, reader = NOBODY;
};

struct SharedArray {
    std::string name;
    std::vector<SharedCell> cells;
};

struct Buffer {
    char* begin;
    long long bytes;
};

struct GlobalBuffer {
    Buffer range;
    std::vector<int> writer, reader;  // per byte address of an element: a thread of the launch
};

enum class State { ready, at_barrier, at_shuffle, done };

struct Fiber {
    ucontext_t context;
    State state = State::ready;
    int line = 0, step = 0;
    unsigned mask = 0;
    float value = 0, received = 0;
};

struct Block {
    Index thread_index, block_index;
    int threads = 0, epoch = 0;
    bool stopped = false;
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<SharedArray>> shared;
    std::vector<GlobalBuffer> buffers;
    std::vector<std::string> violations;
    std::map<std::string, int> violations_of_kind;
    int violation_count = 0;

    int thread() const { return static_cast<int>(thread_index.x); }
    int launch_thread() const { return static_cast<int>(block_index.x) * threads + thread(); }
};

inline Block block;

// Counts a violation; the first few of each kind, which is the text before the colon, are kept in words.
inline void report(const std::string& what) {
    ++block.violation_count;
    if (++block.violations_of_kind[what.substr(0, what.find(':'))] <= 2) {
        block.violations.push_back("block " + std::to_string(block.block_index.x) + ", thread " +
                                   std::to_string(block.thread()) + ": " + what);
    }
}

inline void yield() {
    Fiber& fiber = block.fibers[block.thread()];
    swapcontext(&fiber.context, &block.scheduler);
}

inline void wait_at_barrier(int line) {
    Fiber& fiber = block.fibers[block.thread()];
    fiber.state = State::at_barrier;
    fiber.line = line;
    yield();
}

inline float shuffle_xor(unsigned mask, float value, int step, int line) {
    Fiber& fiber = block.fibers[block.thread()];
    fiber.state = State::at_shuffle;
    fiber.mask = mask, fiber.value = value, fiber.step = step, fiber.line = line;
    yield();
    return fiber.received;
}

class SharedFloats {
   public:
    SharedFloats(SharedArray* array, long offset) : array_(array), offset_(offset) {}
    SharedFloats operator+(long step) const { return {array_, offset_ + step}; }

    struct Word {
        SharedArray* array;
        long index;
        operator float() const { return load(array, index); }
        float operator=(float value) const {
            store(array, index, value);
            return value;
        }
        float operator+=(float value) const { return *this = load(array, index) + value; }
    };
    Word operator[](long index) const { return {array_, offset_ + index}; }

    bool aligned(int vector) const { return offset_ % vector == 0; }
    std::string place(long index = 0) const { return array_->name + "[" + std::to_string(offset_ + index) + "]"; }

   private:
    static SharedCell* cell(SharedArray* array, long index, const char* access) {
        if (index < 0 || index >= static_cast<long>(array->cells.size())) {
            report(std::string("out of bounds: shared ") + access + " " + array->name + "[" + std::to_string(index) +
                   "] of " + std::to_string(array->cells.size()));
            return nullptr;
        }
        return &array->cells[index];
    }
    static void race(SharedArray* array, long index, int other, const char* access) {
        report("race: shared " + array->name + "[" + std::to_string(index) + "] is " + access + " with thread " +
               (other == SEVERAL ? std::string("(several)") : std::to_string(other)) + " and no barrier between");
    }
    static float load(SharedArray* array, long index) {
        SharedCell* at = cell(array, index, "read");
        if (!at) return std::numeric_limits<float>::quiet_NaN();
        const int me = block.thread();
        if (!at->written) report("uninitialised: shared " + array->name + "[" + std::to_string(index) + "] is read");
        if (at->write_epoch == block.epoch && at->writer != me) race(array, index, at->writer, "read");
        if (at->read_epoch != block.epoch) at->read_epoch = block.epoch, at->reader = me;
        if (at->reader != me) at->reader = SEVERAL;
        return at->value;
    }
    static void store(SharedArray* array, long index, float value) {
        SharedCell* at = cell(array, index, "write");
        if (!at) return;
        const int me = block.thread();
        if (at->write_epoch == block.epoch && at->writer != me) race(array, index, at->writer, "written");
        if (at->read_epoch == block.epoch && at->reader != me) race(array, index, at->reader, "overwritten");
        at->write_epoch = block.epoch, at->writer = me, at->written = true, at->value = value;
    }

    SharedArray* array_;
    long offset_;
};

inline SharedFloats shared_array(const char* name, long count) {
    size_t bytes = 0;
    for (auto& array : block.shared) {
        if (array->name == name) return {array.get(), 0};
        bytes += array->cells.size() * sizeof(float);
    }
    if (bytes + count * sizeof(float) > SHARED_LIMIT) report("more than 48 KiB of static shared memory");
    block.shared.push_back(std::make_unique<SharedArray>());
    block.shared.back()->name = name;
    block.shared.back()->cells.resize(count);
    return {block.shared.back().get(), 0};
}

// The buffer that holds [address, address + bytes), or null. Nothing is checked in a launch without known buffers.
inline GlobalBuffer* find_buffer(const void* address, size_t bytes, const char* access) {
    const char* at = static_cast<const char*>(address);
    for (auto& buffer : block.buffers) {
        if (at >= buffer.range.begin && at + bytes <= buffer.range.begin + buffer.range.bytes) return &buffer;
    }
    report(std::string("out of bounds: global ") + access + " outside every tensor");
    return nullptr;
}

}  // namespace emulator

using SharedFloats = emulator::SharedFloats;

template <class T>
T read(const T* from, int index) {
    if (emulator::block.buffers.empty()) return from[index];
    auto* buffer = emulator::find_buffer(from + index, sizeof(T), "read");
    if (!buffer) return T(std::numeric_limits<float>::quiet_NaN());
    const size_t at = reinterpret_cast<const char*>(from + index) - buffer->range.begin;
    const int me = emulator::block.launch_thread();
    if (buffer->writer[at] != emulator::NOBODY && buffer->writer[at] != me) {
        emulator::report("race: global memory is read that another thread of the launch writes");
    }
    if (buffer->reader[at] == emulator::NOBODY) buffer->reader[at] = me;
    if (buffer->reader[at] != me) buffer->reader[at] = emulator::SEVERAL;
    return from[index];
}

template <class T>
void write(T* to, int index, T value) {
    if (emulator::block.buffers.empty()) {
        to[index] = value;
        return;
    }
    auto* buffer = emulator::find_buffer(to + index, sizeof(T), "write");
    if (!buffer) return;
    const size_t at = reinterpret_cast<char*>(to + index) - buffer->range.begin;
    const int me = emulator::block.launch_thread();
    if (buffer->writer[at] != emulator::NOBODY && buffer->writer[at] != me) {
        emulator::report("race: global memory is written by two threads of the launch");
    }
    if (buffer->reader[at] != emulator::NOBODY && buffer->reader[at] != me) {
        emulator::report("race: global memory is written that another thread of the launch reads");
    }
    buffer->writer[at] = me;
    to[index] = value;
}

template <int VECTOR>
void read_vector(SharedFloats from, float* to) {
    if (!from.aligned(VECTOR)) emulator::report("misaligned: shared vector at " + from.place());
    for (int n = 0; n < VECTOR; ++n) to[n] = from[n];
}

namespace emulator {

struct Kernel {
    std::string expression, symbol;
    int threads;
    void (*call)(void* function, void** arguments);
    void* function;
};

template <class... A>
void call_with(void* function, void** arguments) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        reinterpret_cast<void (*)(A...)>(function)(*static_cast<A*>(arguments[I])...);
    }(std::index_sequence_for<A...>{});
}

template <class... A>
Kernel kernel(const char* expression, int threads, void (*function)(A...)) {
    Dl_info info{};
    dladdr(reinterpret_cast<void*>(function), &info);
    return {expression, info.dli_sname ? info.dli_sname : "", threads, &call_with<std::remove_const_t<A>...>,
            reinterpret_cast<void*>(function)};
}

inline const Kernel* running;
inline void** running_arguments;

inline void fiber_main() {
    running->call(running->function, running_arguments);
    block.fibers[block.thread()].state = State::done;
    yield();
}

inline bool release_shuffles() {
    bool released = false;
    for (int first = 0; first < block.threads; first += WARP) {
        const int lanes = min(WARP, block.threads - first);
        for (int lane = 0; lane < lanes; ++lane) {
            Fiber& leader = block.fibers[first + lane];
            if (leader.state != State::at_shuffle) continue;
            block.thread_index.x = first + lane;
            if (!(leader.mask >> lane & 1)) report("divergent shuffle: the mask lacks the calling lane");
            bool complete = true;
            for (int other = 0; other < WARP; ++other) {
                if (!(leader.mask >> other & 1)) continue;
                if (other >= lanes) {
                    complete = false;
                    continue;
                }
                const Fiber& fiber = block.fibers[first + other];
                complete = complete && fiber.state == State::at_shuffle && fiber.mask == leader.mask &&
                           fiber.line == leader.line && fiber.step == leader.step;
            }
            if (!complete) continue;
            for (int other = 0; other < lanes; ++other) {
                if (!(leader.mask >> other & 1)) continue;
                Fiber& fiber = block.fibers[first + other];
                const int source = other ^ fiber.step;
                const bool in_mask = source < WARP && (leader.mask >> source & 1);
                if (!in_mask) report("divergent shuffle: a lane reads a lane outside the mask");
                fiber.received =
                    in_mask ? block.fibers[first + source].value : std::numeric_limits<float>::quiet_NaN();
                fiber.state = State::ready;
            }
            released = true;
        }
    }
    return released;
}

inline bool release_barrier() {
    const int line = block.fibers[0].line;
    for (int t = 0; t < block.threads; ++t) {
        if (block.fibers[t].state != State::at_barrier) return false;
        if (block.fibers[t].line != line) {
            block.thread_index.x = t;
            report("divergent barrier: reached in line " + std::to_string(block.fibers[t].line) +
                   " by this thread, in line " + std::to_string(line) + " by thread 0");
        }
    }
    for (auto& fiber : block.fibers) fiber.state = State::ready;
    ++block.epoch;
    return true;
}

inline void run_block(const std::vector<int>& order, std::vector<std::vector<char>>& stacks) {
    block.shared.clear();
    block.epoch = 0;
    block.fibers = std::vector<Fiber>(block.threads);
    for (int t = 0; t < block.threads; ++t) {
        ucontext_t& context = block.fibers[t].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks[t].data();
        context.uc_stack.ss_size = stacks[t].size();
        context.uc_link = nullptr;
        makecontext(&context, fiber_main, 0);
    }
    while (true) {
        int done = 0;
        for (int t : order) {
            Fiber& fiber = block.fibers[t];
            if (fiber.state == State::ready) {
                block.thread_index.x = t;
                swapcontext(&block.scheduler, &fiber.context);
            }
            done += fiber.state == State::done;
        }
        if (done == block.threads) return;
        if (release_shuffles() || release_barrier()) continue;
        for (int t = 0; t < block.threads; ++t) {
            const Fiber& fiber = block.fibers[t];
            if (fiber.state == State::ready || fiber.state == State::done) continue;
            block.thread_index.x = t;
            report(std::string("divergent ") + (fiber.state == State::at_barrier ? "barrier" : "shuffle") +
                   ": not every thread reaches the one in line " + std::to_string(fiber.line));
            break;
        }
        block.stopped = true;
        return;
    }
}

// order: 0 ascending, 1 descending, otherwise the seed of a shuffle, anew for each block.
inline int launch(const Kernel& kernel, unsigned grid, unsigned threads, void** arguments, const Buffer* buffers,
                  int buffer_count, unsigned order, char* text, int text_bytes) {
    block = Block();
    running = &kernel, running_arguments = arguments;
    block.threads = static_cast<int>(threads);
    for (int n = 0; n < buffer_count; ++n) {
        const size_t bytes = buffers[n].bytes;
        block.buffers.push_back({buffers[n], std::vector<int>(bytes, NOBODY), std::vector<int>(bytes, NOBODY)});
    }
    if (static_cast<int>(threads) != kernel.threads) {
        report("launched with " + std::to_string(threads) + " threads, built for " + std::to_string(kernel.threads));
    } else {
        static std::vector<std::vector<char>> stacks;
        while (stacks.size() < threads) stacks.emplace_back(STACK_BYTES);
        std::vector<int> threads_in_order(threads);
        std::mt19937 random(order);
        for (unsigned b = 0; b < grid && !block.stopped; ++b) {
            block.block_index.x = b;
            for (unsigned t = 0; t < threads; ++t) threads_in_order[t] = static_cast<int>(order == 1 ? threads - 1 - t : t);
            if (order > 1) std::shuffle(threads_in_order.begin(), threads_in_order.end(), random);
            run_block(threads_in_order, stacks);
        }
    }
    std::string all;
    for (auto& violation : block.violations) all += violation + "\n";
    std::snprintf(text, text_bytes, "%s", all.c_str());
    return block.violation_count;
}

}  // namespace emulator

std::vector<emulator::Kernel> emulated_kernels();

// Runs a kernel, named by its expression or its mangled symbol. Returns the number of violations, -1 for an unknown
// kernel; `text` receives the first few, a line each.
extern "C" int emulator_launch(const char* name, unsigned grid, unsigned threads, void** arguments,
                               const emulator::Buffer* buffers, int buffer_count, unsigned order, char* text,
                               int text_bytes) {
    static const std::vector<emulator::Kernel> kernels = emulated_kernels();
    for (auto& kernel : kernels) {
        if (kernel.expression == name || kernel.symbol == name) {
            return emulator::launch(kernel, grid, threads, arguments, buffers, buffer_count, order, text, text_bytes);
        }
    }
    return -1;
}
