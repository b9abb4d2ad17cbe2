// Local self-attention, forward and backward (Ramachandran et al., NeurIPS 2019, arXiv 1906.05909, section 3):
//
//   y_i = sum_j p_ij v_j,   p_ij = softmax_j(q_i.k_j + q_i.r_{j-i}),   j in the KxK window around pixel i,
//
// per head, without 1/sqrt(d). r holds a row half and a column half, so that q.r is K row terms plus K column terms.
// Gradients, with D_i = dy_i.y_i:  ds_ij = p_ij (dy_i.v_j - D_i),  dq_i = sum_j ds_ij (k_j + r_{j-i}),
//   dk_j = sum_i ds_ij q_i,  dv_j = sum_i p_ij dy_i,  dr_t = sum_i ds_{i,i+t} q_i.
//
// One thread owns PIXELS neighbouring pixels of one row and every LANES-th channel of one head; LANES neighbouring
// threads add up their shares of a logit with shuffles. A block owns COLUMNS*PIXELS x ROWS pixels of IMAGES images, an
// image being one head of one batch entry. A warp works on one image row, of several images where one is too narrow: so
// its threads visit the same rows of their windows. The rows of the window pass through shared memory as float, STAGED
// at a time, and the softmax is accumulated row by row, so no tensor with K*K entries exists anywhere. A window wider
// than SEGMENT columns passes in several segments. All kernels are deterministic: a value has one writer, and every sum
// has a fixed order.
//
// Maps are [batch, heads * HEAD_WIDTH, height, width] with dense planes; batch entries lie `stride` elements apart, so
// that q, k and v, and their gradients, may be thirds of one tensor.
//
// Logits are in units of log2(e): exp2 is the hardware's own exponential.

#ifndef CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SHARED_FLOATS(name, count) __shared__ __align__(16) float name[count]
#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define POSITIVE_INFINITY __int_as_float(0x7f800000)

using SharedFloats = float*;

template <class T>
__device__ __forceinline__ T read(const T* from, int index) {
    return from[index];
}

template <class T>
__device__ __forceinline__ void write(T* to, int index, T value) {
    to[index] = value;
}

template <int VECTOR>
__device__ __forceinline__ void read_vector(const float* from, float* to) {
    if constexpr (VECTOR == 4) {
        const float4 value = *reinterpret_cast<const float4*>(from);
        to[0] = value.x, to[1] = value.y, to[2] = value.z, to[3] = value.w;
    } else if constexpr (VECTOR == 2) {
        const float2 value = *reinterpret_cast<const float2*>(from);
        to[0] = value.x, to[1] = value.y;
    } else {
        to[0] = *from;
    }
}
#endif

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.0e38f;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T> __device__ __forceinline__ T from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ __half from_float<__half>(float value) { return __float2half_rn(value); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// What is computed (the first five) and how (the rest, chosen by `sasa_bench/impls/cuda`).
template <class Element_, int KERNEL_SIZE_, int HEAD_WIDTH_, bool POSITION_, bool ZERO_BORDER_, int PIXELS_, int LANES_,
          int COLUMNS_, int ROWS_, int IMAGES_, int STAGED_, int SEGMENT_, int RESIDENT_>
struct Plan {
    using Element = Element_;
    static constexpr int KERNEL_SIZE = KERNEL_SIZE_, RADIUS = KERNEL_SIZE / 2;
    static constexpr int HEAD_WIDTH = HEAD_WIDTH_, ROW_HALF = HEAD_WIDTH / 2;
    static constexpr bool POSITION = POSITION_, ZERO_BORDER = ZERO_BORDER_;
    static constexpr int PIXELS = PIXELS_, LANES = LANES_, COLUMNS = COLUMNS_, ROWS = ROWS_, STAGED = STAGED_;
    static constexpr int IMAGES = IMAGES_;
    static constexpr int SEGMENT = SEGMENT_, SEGMENTS = (KERNEL_SIZE + SEGMENT - 1) / SEGMENT;
    static constexpr int RESIDENT = RESIDENT_;  // blocks that a multiprocessor holds: caps the registers of a thread

    // Whole warps; the last one may have spare threads.
    static constexpr int ROW_THREADS = (LANES * COLUMNS * IMAGES + 31) / 32 * 32;
    static constexpr int THREADS = ROW_THREADS * ROWS;
    static constexpr int TILE_WIDTH = COLUMNS * PIXELS;
    static constexpr int TILE_PITCH = TILE_WIDTH * ROWS + 1;
    static constexpr int CHANNELS = (HEAD_WIDTH + LANES - 1) / LANES;

    // A staged row is read in vectors that start at a thread's first pixel.
    static constexpr int VECTOR = PIXELS % 4 == 0 ? 4 : PIXELS % 2 == 0 ? 2 : 1;
    static constexpr int LINE = (PIXELS + SEGMENT - 1 + VECTOR - 1) / VECTOR * VECTOR;
    static constexpr int PITCH = (COLUMNS - 1) * PIXELS + LINE;

    // The lanes that one shared-memory transaction serves sit in different channel planes: this residue modulo the 32
    // banks keeps their vectors apart.
    static constexpr int BANK_STEP = LANES == 1 ? VECTOR : 32 / (LANES * VECTOR < 32 ? LANES : 32 / VECTOR);
    static constexpr int PLANE =
        LANES == 1 ? STAGED * PITCH : STAGED * PITCH + (32 + BANK_STEP - STAGED * PITCH % 32) % 32;
    static constexpr int PLANES = LANES * CHANNELS;

    // The next image continues the banks where the row of threads before it ends.
    static constexpr int MEMBER =
        IMAGES == 1 ? PLANES * PLANE : PLANES * PLANE + ((TILE_WIDTH - PLANES * PLANE) % 32 + 32) % 32;
    static constexpr int STAGE = IMAGES * MEMBER;

    // COPIERS neighbouring threads copy a staged row, about four words each.
    static constexpr int COPIERS = PITCH >= 128 ? 32 : PITCH >= 64 ? 16 : PITCH >= 32 ? 8 : 4;

    static_assert(KERNEL_SIZE % 2 == 1, "KERNEL_SIZE must be odd");
    static_assert((LANES & (LANES - 1)) == 0 && LANES <= 32, "LANES must be a power of two, at most 32");
};

// Sizes of the maps: `images` = batch * heads; batch entries of q, k, v lie `stride` elements apart.
struct Sizes {
    int height, width, heads, images, stride;

    __device__ int pixels() const { return height * width; }
    // Where channel 0 of an image begins in a map whose batch entries lie `step` elements apart.
    __device__ long long map(int image, int width_of_head, int step) const {
        return static_cast<long long>(image / heads) * step + image % heads * width_of_head * pixels();
    }
};

// Where a thread works: pixels (y, x) .. (y, x + PIXELS - 1) of an image, the block's `member`. A spare thread has no
// pixel.
template <class P>
struct Place {
    int tile, tiles, first_image, first_y, first_x, lane, column, member, row, image, head, y, x, pixels, height, width;
    bool spare;

    __device__ explicit Place(const Sizes& sizes)
        : pixels(sizes.pixels()), height(sizes.height), width(sizes.width) {
        const int across = (width + P::TILE_WIDTH - 1) / P::TILE_WIDTH;
        tiles = across * ((height + P::ROWS - 1) / P::ROWS);
        tile = static_cast<int>(blockIdx.x) % tiles;
        first_image = static_cast<int>(blockIdx.x) / tiles * P::IMAGES;
        first_y = tile / across * P::ROWS;
        first_x = tile % across * P::TILE_WIDTH;
        const int thread = static_cast<int>(threadIdx.x);
        const int slot = thread % P::ROW_THREADS;
        lane = slot % P::LANES;
        column = slot / P::LANES % P::COLUMNS;
        member = min(slot / (P::LANES * P::COLUMNS), P::IMAGES - 1);
        row = thread / P::ROW_THREADS;
        image = min(first_image + member, sizes.images - 1);
        spare = slot >= P::LANES * P::COLUMNS * P::IMAGES || first_image + member >= sizes.images;
        head = image % sizes.heads;
        y = first_y + row;
        x = first_x + column * P::PIXELS;
    }

    __device__ bool inside(int p) const { return !spare && y < height && x + p < width; }
    __device__ int pixel(int p) const { return y * width + x + p; }
    __device__ int channel(int c) const { return c * P::LANES + lane; }
    __device__ long long plane(int planes) const { return static_cast<long long>(image) * planes * pixels; }
};

template <class P, int N>
__device__ __forceinline__ void sum_over_lanes(float (&values)[N]) {
    if constexpr (P::LANES > 1) {
        const unsigned warp_lane = threadIdx.x % 32;
        const unsigned group = (P::LANES == 32 ? 0xffffffffu : (1u << (P::LANES % 32)) - 1u)
                               << (warp_lane - warp_lane % P::LANES);
#pragma unroll
        for (int step = 1; step < P::LANES; step *= 2) {
#pragma unroll
            for (int n = 0; n < N; ++n) values[n] += __shfl_xor_sync(group, values[n], step);
        }
    }
}

template <class P>
__device__ __forceinline__ float relative(const typename P::Element* rel_row, const typename P::Element* rel_col,
                                          int head, int channel, int offset) {
    if (channel < P::ROW_HALF) {
        return to_float(read(rel_row, (head * P::ROW_HALF + channel) * P::KERNEL_SIZE + offset));
    }
    const int half = P::HEAD_WIDTH - P::ROW_HALF;
    return to_float(read(rel_col, (head * half + channel - P::ROW_HALF) * P::KERNEL_SIZE + offset));
}

// Reads a thread's own pixels of one tensor, times `scale`; zero outside the image and beyond the last channel.
template <class P>
__device__ __forceinline__ void read_own(const typename P::Element* from, const Place<P>& place, float scale,
                                         float (&own)[P::PIXELS][P::CHANNELS]) {
#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) {
#pragma unroll
        for (int c = 0; c < P::CHANNELS; ++c) {
            const int channel = place.channel(c);
            own[p][c] = place.inside(p) && channel < P::HEAD_WIDTH
                            ? scale * to_float(read(from, channel * place.pixels + place.pixel(p)))
                            : 0.0f;
        }
    }
}

template <class P>
__device__ __forceinline__ void write_own(typename P::Element* to, const Place<P>& place,
                                          const float (&own)[P::PIXELS][P::CHANNELS]) {
#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) {
#pragma unroll
        for (int c = 0; c < P::CHANNELS; ++c) {
            const int channel = place.channel(c);
            if (place.inside(p) && channel < P::HEAD_WIDTH) {
                write(to, channel * place.pixels + place.pixel(p), from_float<typename P::Element>(own[p][c]));
            }
        }
    }
}

// A map to copy to shared memory. Batch entries lie `step` elements apart. What is beside the image, of a channel too
// many or of an image that is not there becomes `outside`.
template <class T>
struct Source {
    const T* all;
    int step;
    float outside;
    SharedFloats to;
};

// Copies STAGED rows of `planes` channel planes of each of the block's images, of two maps. In shared memory an image
// has PLANES planes and MEMBER words.
template <class P, int PLANES, int MEMBER, class T>
__device__ __forceinline__ void stage(const Source<T>& one, const Source<T>& other, int planes, int first_y,
                                      int first_x, const Place<P>& place, const Sizes& sizes) {
    constexpr int STEPS = (P::PITCH + P::COPIERS - 1) / P::COPIERS, COPIED = P::THREADS / P::COPIERS;
    const int copier = static_cast<int>(threadIdx.x) % P::COPIERS, first = static_cast<int>(threadIdx.x) / P::COPIERS;
#pragma unroll 1
    for (int member = 0; member < P::IMAGES; ++member) {
        const int image = place.first_image + member;
        const int there = image < sizes.images ? planes : 0;
        const T* one_from = one.all + sizes.map(image, planes, one.step);
        const T* other_from = other.all + sizes.map(image, planes, other.step);
#pragma unroll 1
        for (int line = first; line < PLANES * P::STAGED; line += COPIED) {
            const int channel = line / P::STAGED, row = line % P::STAGED, y = first_y + row;
            const bool inside =
                channel < there && static_cast<unsigned>(y) < static_cast<unsigned>(sizes.height);
            const int from = (channel * sizes.height + y) * sizes.width + first_x + copier;
            const int to = member * MEMBER + channel * P::PLANE + row * P::PITCH + copier;
            float one_values[STEPS], other_values[STEPS];
#pragma unroll
            for (int n = 0; n < STEPS; ++n) {
                const unsigned x = static_cast<unsigned>(first_x + copier + n * P::COPIERS);  // large left of the image
                const bool there_too = inside && x < static_cast<unsigned>(sizes.width);
                one_values[n] = there_too ? to_float(read(one_from, from + n * P::COPIERS)) : one.outside;
                other_values[n] = there_too ? to_float(read(other_from, from + n * P::COPIERS)) : other.outside;
            }
            const SharedFloats one_to = one.to + to, other_to = other.to + to;
#pragma unroll
            for (int n = 0; n < STEPS; ++n) {
                if (copier + n * P::COPIERS < P::PITCH) {
                    one_to[n * P::COPIERS] = one_values[n];
                    other_to[n * P::COPIERS] = other_values[n];
                }
            }
        }
    }
}

// Stages the rows that the block's windows cover and calls visit(a, y, r) for each row `a` of the thread's window:
// image row `y`, staged as row `r`.
template <class P, bool EVERY_ROW, class Stage, class Visit>
__device__ __forceinline__ void sweep_rows(const Place<P>& place, Stage stage_rows, Visit visit) {
    const int rows = place.y < place.height && !place.spare ? P::KERNEL_SIZE : 0;
#pragma unroll 1
    for (int first = 0; first < P::ROWS + P::KERNEL_SIZE - 1; first += P::STAGED) {
        __syncthreads();
        stage_rows(place.first_y - P::RADIUS + first);
        __syncthreads();
        const int begin = max(0, first - place.row);
        const int end = min(rows, first + P::STAGED - place.row);
#pragma unroll 1
        for (int a = begin; a < end; ++a) {
            const int y = place.y + a - P::RADIUS;
            if (EVERY_ROW || (y >= 0 && y < place.height)) visit(a, y, place.row + a - first);
        }
    }
}

template <class P>
__device__ __forceinline__ SharedFloats staged_line(SharedFloats staged, const Place<P>& place, int row, int c) {
    return staged +
           (place.member * P::MEMBER + place.channel(c) * P::PLANE + row * P::PITCH + place.column * P::PIXELS);
}

template <class P>
__device__ __forceinline__ void read_line(SharedFloats from, float (&line)[P::LINE]) {
#pragma unroll
    for (int n = 0; n < P::LINE; n += P::VECTOR) read_vector<P::VECTOR>(from + n, line + n);
}

// sums[p][b] += sum over the thread's channels of own[p] . staged pixel p + b
template <class P>
__device__ __forceinline__ void correlate(const float (&own)[P::PIXELS][P::CHANNELS], SharedFloats staged,
                                          const Place<P>& place, int row, float (&sums)[P::PIXELS][P::SEGMENT]) {
#pragma unroll
    for (int c = 0; c < P::CHANNELS; ++c) {
        float line[P::LINE];
        read_line<P>(staged_line<P>(staged, place, row, c), line);
#pragma unroll
        for (int p = 0; p < P::PIXELS; ++p) {
#pragma unroll
            for (int b = 0; b < P::SEGMENT; ++b) sums[p][b] += own[p][c] * line[p + b];
        }
    }
}

// own[p][c] += sum over b of weights[p][b] * staged pixel p + b
template <class P>
__device__ __forceinline__ void accumulate(const float (&weights)[P::PIXELS][P::SEGMENT], SharedFloats staged,
                                           const Place<P>& place, int row, float (&own)[P::PIXELS][P::CHANNELS]) {
#pragma unroll
    for (int c = 0; c < P::CHANNELS; ++c) {
        float line[P::LINE];
        read_line<P>(staged_line<P>(staged, place, row, c), line);
#pragma unroll
        for (int p = 0; p < P::PIXELS; ++p) {
#pragma unroll
            for (int b = 0; b < P::SEGMENT; ++b) own[p][c] += weights[p][b] * line[p + b];
        }
    }
}

// The part of the logits that a window column fixes: the thread's share of q.r over the column half, or minus infinity
// where the column takes no part in the softmax.
template <class P>
__device__ __forceinline__ void column_logits(const float (&q)[P::PIXELS][P::CHANNELS],
                                              const typename P::Element* rel_row, const typename P::Element* rel_col,
                                              const Place<P>& place, int segment,
                                              float (&logits)[P::PIXELS][P::SEGMENT]) {
#pragma unroll
    for (int b = 0; b < P::SEGMENT; ++b) {
        const int offset = segment * P::SEGMENT + b;
#pragma unroll
        for (int p = 0; p < P::PIXELS; ++p) {
            const int x = place.x + p + offset - P::RADIUS;
            const bool takes_part = offset < P::KERNEL_SIZE && (P::ZERO_BORDER || (x >= 0 && x < place.width));
            logits[p][b] = takes_part ? 0.0f : NEGATIVE_INFINITY;
        }
        if constexpr (P::POSITION) {
#pragma unroll
            for (int c = 0; c < P::CHANNELS; ++c) {
                const int channel = place.channel(c);
                if (channel >= P::ROW_HALF && channel < P::HEAD_WIDTH && offset < P::KERNEL_SIZE) {
                    const float r = relative<P>(rel_row, rel_col, place.head, channel, offset);
#pragma unroll
                    for (int p = 0; p < P::PIXELS; ++p) logits[p][b] += q[p][c] * r;
                }
            }
        }
    }
}

// The thread's share of the logits of window row `a`.
template <class P>
__device__ __forceinline__ void row_logits(const float (&q)[P::PIXELS][P::CHANNELS],
                                           const float (&column_logit)[P::PIXELS][P::SEGMENT], SharedFloats keys,
                                           const typename P::Element* rel_row, const typename P::Element* rel_col,
                                           const Place<P>& place, int a, int row,
                                           float (&logits)[P::PIXELS][P::SEGMENT]) {
#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) {
        float row_logit = 0.0f;
        if constexpr (P::POSITION) {
#pragma unroll
            for (int c = 0; c < P::CHANNELS; ++c) {
                const int channel = place.channel(c);
                if (channel < P::ROW_HALF) {
                    row_logit += q[p][c] * relative<P>(rel_row, rel_col, place.head, channel, a);
                }
            }
        }
#pragma unroll
        for (int b = 0; b < P::SEGMENT; ++b) logits[p][b] = column_logit[p][b] + row_logit;
    }
    correlate<P>(q, keys, place, row, logits);
}

// y: [images, HEAD_WIDTH, height, width], images = batch * heads; log2_sum: [images, height, width], the base-2
// logarithm of the softmax's denominator. Grid: ceil(images / IMAGES) * tiles blocks.
template <class P>
__global__ void __launch_bounds__(P::THREADS, P::RESIDENT)
    forward(const typename P::Element* __restrict__ q_all, const typename P::Element* __restrict__ k_all,
            const typename P::Element* __restrict__ v_all, const typename P::Element* __restrict__ rel_row,
            const typename P::Element* __restrict__ rel_col, typename P::Element* __restrict__ y_all,
            float* __restrict__ log2_sum, int height, int width, int heads, int images, int stride) {
    SHARED_FLOATS(keys, P::STAGE);
    SHARED_FLOATS(values, P::STAGE);
    const Sizes sizes{height, width, heads, images, stride};
    const Place<P> place(sizes);

    float q[P::PIXELS][P::CHANNELS];
    read_own<P>(q_all + sizes.map(place.image, P::HEAD_WIDTH, stride), place, LOG2_E, q);
    float y[P::PIXELS][P::CHANNELS] = {};
    float peak[P::PIXELS], total[P::PIXELS];
#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) peak[p] = LOWEST, total[p] = 0.0f;

#pragma unroll 1
    for (int segment = 0; segment < P::SEGMENTS; ++segment) {
        const int first_x = place.first_x - P::RADIUS + segment * P::SEGMENT;
        float column_logit[P::PIXELS][P::SEGMENT];
        column_logits<P>(q, rel_row, rel_col, place, segment, column_logit);
        sweep_rows<P, P::ZERO_BORDER>(
            place,
            [&](int first_y) {
                stage<P, P::PLANES, P::MEMBER, typename P::Element>({k_all, stride, 0.0f, keys},
                                                                    {v_all, stride, 0.0f, values}, P::HEAD_WIDTH,
                                                                    first_y, first_x, place, sizes);
            },
            [&](int a, int, int row) {
                float weights[P::PIXELS][P::SEGMENT];
                row_logits<P>(q, column_logit, keys, rel_row, rel_col, place, a, row, weights);
#pragma unroll
                for (int p = 0; p < P::PIXELS; ++p) {
                    sum_over_lanes<P>(weights[p]);
                    float new_peak = peak[p];
#pragma unroll
                    for (int b = 0; b < P::SEGMENT; ++b) new_peak = fmaxf(new_peak, weights[p][b]);
                    const float rescale = exp2f(peak[p] - new_peak);
                    peak[p] = new_peak;
                    total[p] *= rescale;
#pragma unroll
                    for (int c = 0; c < P::CHANNELS; ++c) y[p][c] *= rescale;
#pragma unroll
                    for (int b = 0; b < P::SEGMENT; ++b) {
                        weights[p][b] = exp2f(weights[p][b] - new_peak);
                        total[p] += weights[p][b];
                    }
                }
                accumulate<P>(weights, values, place, row, y);
            });
    }

#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) {
        const float inverse = 1.0f / total[p];
#pragma unroll
        for (int c = 0; c < P::CHANNELS; ++c) y[p][c] *= inverse;
        if (place.lane == 0 && place.inside(p)) {
            write(log2_sum + place.plane(1), place.pixel(p), peak[p] + log2f(total[p]));
        }
    }
    write_own<P>(y_all + place.plane(P::HEAD_WIDTH), place, y);
}

// dq, and for backward_keys: delta = dy.y [images, height, width] and, with positions, the column logits
// [images, KERNEL_SIZE, height, width]. partials [images, tiles, HEAD_WIDTH, KERNEL_SIZE]: the tile's share of the
// gradient of the position embeddings, row half first. Batch entries of dq lie `d_stride` elements apart. Grid:
// ceil(images / IMAGES) * tiles blocks.
//
// `reload` is 0, which the compiler does not know: it would otherwise keep every line of the first pass over the
// channels in registers for the second, and spill.
template <class P>
__global__ void __launch_bounds__(P::THREADS, P::RESIDENT)
    backward_queries(const typename P::Element* __restrict__ q_all, const typename P::Element* __restrict__ k_all,
                     const typename P::Element* __restrict__ v_all, const typename P::Element* __restrict__ rel_row,
                     const typename P::Element* __restrict__ rel_col, const typename P::Element* __restrict__ y_all,
                     const typename P::Element* __restrict__ dy_all, const float* __restrict__ log2_sum,
                     typename P::Element* __restrict__ dq_all, float* __restrict__ delta_all,
                     float* __restrict__ column_logits_all, float* __restrict__ partials, int height, int width,
                     int heads, int images, int stride, int d_stride, int reload) {
    constexpr int OFFSETS = 2 * P::KERNEL_SIZE;
    SHARED_FLOATS(keys, P::STAGE);
    SHARED_FLOATS(values, P::STAGE);
    SHARED_FLOATS(position_sums, P::POSITION ? P::IMAGES * OFFSETS * P::TILE_PITCH : 1);
    const Sizes sizes{height, width, heads, images, stride};
    const Place<P> place(sizes);
    const bool adds = place.lane == 0 && !place.spare;
    const int own_pixel =
        place.member * OFFSETS * P::TILE_PITCH + place.row * P::TILE_WIDTH + place.column * P::PIXELS;

    float q[P::PIXELS][P::CHANNELS], dy[P::PIXELS][P::CHANNELS];
    float dq[P::PIXELS][P::CHANNELS];
    read_own<P>(q_all + sizes.map(place.image, P::HEAD_WIDTH, stride), place, LOG2_E, q);
    read_own<P>(dy_all + place.plane(P::HEAD_WIDTH), place, 1.0f, dy);
    read_own<P>(y_all + place.plane(P::HEAD_WIDTH), place, 1.0f, dq);
    float delta[P::PIXELS], own_log2_sum[P::PIXELS];
#pragma unroll
    for (int p = 0; p < P::PIXELS; ++p) {
        delta[p] = 0.0f;
#pragma unroll
        for (int c = 0; c < P::CHANNELS; ++c) {
            delta[p] += dy[p][c] * dq[p][c];
            dq[p][c] = 0.0f;
        }
        own_log2_sum[p] =
            place.inside(p) ? read(log2_sum + place.plane(1), place.pixel(p)) : POSITIVE_INFINITY;
    }
    sum_over_lanes<P>(delta);
    if (adds) {
#pragma unroll
        for (int p = 0; p < P::PIXELS; ++p) {
            if (place.inside(p)) write(delta_all + place.plane(1), place.pixel(p), delta[p]);
            if constexpr (P::POSITION) {
                for (int a = 0; a < P::KERNEL_SIZE; ++a) position_sums[a * P::TILE_PITCH + own_pixel + p] = 0.0f;
            }
        }
    }

#pragma unroll 1
    for (int segment = 0; segment < P::SEGMENTS; ++segment) {
        const int first_x = place.first_x - P::RADIUS + segment * P::SEGMENT;
        float column_logit[P::PIXELS][P::SEGMENT], column_sum[P::PIXELS][P::SEGMENT] = {};
        column_logits<P>(q, rel_row, rel_col, place, segment, column_logit);
        if constexpr (P::POSITION) {
#pragma unroll
            for (int p = 0; p < P::PIXELS; ++p) {
                float complete[P::SEGMENT];
#pragma unroll
                for (int b = 0; b < P::SEGMENT; ++b) complete[b] = column_logit[p][b];
                sum_over_lanes<P>(complete);
#pragma unroll
                for (int b = 0; b < P::SEGMENT; ++b) {
                    const int offset = segment * P::SEGMENT + b;
                    if (place.lane == 0 && place.inside(p) && offset < P::KERNEL_SIZE) {
                        write(column_logits_all + place.plane(P::KERNEL_SIZE),
                              offset * place.pixels + place.pixel(p), complete[b]);
                    }
                }
            }
        }
        sweep_rows<P, P::ZERO_BORDER>(
            place,
            [&](int first_y) {
                stage<P, P::PLANES, P::MEMBER, typename P::Element>({k_all, stride, 0.0f, keys},
                                                                    {v_all, stride, 0.0f, values}, P::HEAD_WIDTH,
                                                                    first_y, first_x, place, sizes);
            },
            [&](int a, int, int row) {
                float ds[P::PIXELS][P::SEGMENT], dp[P::PIXELS][P::SEGMENT] = {};
                row_logits<P>(q, column_logit, keys, rel_row, rel_col, place, a, row, ds);
                correlate<P>(dy, values, place, row, dp);
                float row_sum[P::PIXELS];
#pragma unroll
                for (int p = 0; p < P::PIXELS; ++p) {
                    sum_over_lanes<P>(ds[p]);
                    sum_over_lanes<P>(dp[p]);
                    row_sum[p] = 0.0f;
#pragma unroll
                    for (int b = 0; b < P::SEGMENT; ++b) {
                        ds[p][b] = exp2f(ds[p][b] - own_log2_sum[p]) * (dp[p][b] - delta[p]);
                        row_sum[p] += ds[p][b];
                        column_sum[p][b] += ds[p][b];
                    }
                }
                accumulate<P>(ds, keys, place, row + reload, dq);
                if constexpr (P::POSITION) {
#pragma unroll
                    for (int c = 0; c < P::CHANNELS; ++c) {
                        const int channel = place.channel(c);
                        if (channel < P::ROW_HALF) {
                            const float r = relative<P>(rel_row, rel_col, place.head, channel, a);
#pragma unroll
                            for (int p = 0; p < P::PIXELS; ++p) dq[p][c] += row_sum[p] * r;
                        }
                    }
                    if (adds) {
#pragma unroll
                        for (int p = 0; p < P::PIXELS; ++p) {
                            position_sums[a * P::TILE_PITCH + own_pixel + p] += row_sum[p];
                        }
                    }
                }
            });
        if constexpr (P::POSITION) {
#pragma unroll
            for (int b = 0; b < P::SEGMENT; ++b) {
                const int offset = segment * P::SEGMENT + b;
                if (offset < P::KERNEL_SIZE) {
#pragma unroll
                    for (int c = 0; c < P::CHANNELS; ++c) {
                        const int channel = place.channel(c);
                        if (channel >= P::ROW_HALF && channel < P::HEAD_WIDTH) {
                            const float r = relative<P>(rel_row, rel_col, place.head, channel, offset);
#pragma unroll
                            for (int p = 0; p < P::PIXELS; ++p) dq[p][c] += column_sum[p][b] * r;
                        }
                    }
                    if (adds) {
#pragma unroll
                        for (int p = 0; p < P::PIXELS; ++p) {
                            position_sums[(P::KERNEL_SIZE + offset) * P::TILE_PITCH + own_pixel + p] =
                                column_sum[p][b];
                        }
                    }
                }
            }
        }
    }
    write_own<P>(dq_all + sizes.map(place.image, P::HEAD_WIDTH, d_stride), place, dq);

    if constexpr (P::POSITION) {
        __syncthreads();
        constexpr int ENTRIES = P::HEAD_WIDTH * P::KERNEL_SIZE;
        const int rows = min(P::ROWS, height - place.first_y), columns = min(P::TILE_WIDTH, width - place.first_x);
        const int members = min(P::IMAGES, images - place.first_image);
        for (int n = static_cast<int>(threadIdx.x); n < members * ENTRIES; n += P::THREADS) {
            const int member = n / ENTRIES, entry = n % ENTRIES, image = place.first_image + member;
            const int channel = entry / P::KERNEL_SIZE, offset = entry % P::KERNEL_SIZE;
            const int line = member * OFFSETS + (channel < P::ROW_HALF ? 0 : P::KERNEL_SIZE) + offset;
            const auto* q_plane = q_all + sizes.map(image, P::HEAD_WIDTH, stride);
            float sum = 0.0f;
            for (int row = 0; row < rows; ++row) {
                const int from = (channel * height + place.first_y + row) * width + place.first_x;
                for (int column = 0; column < columns; ++column) {
                    sum += to_float(read(q_plane, from + column)) *
                           position_sums[line * P::TILE_PITCH + row * P::TILE_WIDTH + column];
                }
            }
            write(partials + (static_cast<long long>(image) * place.tiles + place.tile) * ENTRIES, entry, sum);
        }
    }
}

// dk and dv. A thread owns keys and visits the queries whose window holds them: window row `a` of the sweep, seen from
// the query, is row KERNEL_SIZE - 1 - a. Grid: ceil(images / IMAGES) * tiles blocks.
template <class P>
__global__ void __launch_bounds__(P::THREADS, P::RESIDENT)
    backward_keys(const typename P::Element* __restrict__ q_all, const typename P::Element* __restrict__ k_all,
                  const typename P::Element* __restrict__ v_all, const typename P::Element* __restrict__ rel_row,
                  const typename P::Element* __restrict__ rel_col, const typename P::Element* __restrict__ dy_all,
                  const float* __restrict__ log2_sum, const float* __restrict__ delta_all,
                  const float* __restrict__ column_logits_all, typename P::Element* __restrict__ dk_all,
                  typename P::Element* __restrict__ dv_all, int height, int width, int heads, int images, int stride,
                  int d_stride, int reload) {
    SHARED_FLOATS(queries, P::STAGE);
    SHARED_FLOATS(gradients, P::STAGE);
    SHARED_FLOATS(log2_sums, P::IMAGES * P::PLANE);
    SHARED_FLOATS(deltas, P::IMAGES * P::PLANE);
    const Sizes sizes{height, width, heads, images, stride};
    const Place<P> place(sizes);
    const long long own = sizes.map(place.image, P::HEAD_WIDTH, stride);

    float k[P::PIXELS][P::CHANNELS], v[P::PIXELS][P::CHANNELS];
    read_own<P>(k_all + own, place, LOG2_E, k);
    read_own<P>(v_all + own, place, 1.0f, v);
    float dk[P::PIXELS][P::CHANNELS] = {}, dv[P::PIXELS][P::CHANNELS] = {};

#pragma unroll 1
    for (int segment = 0; segment < P::SEGMENTS; ++segment) {
        const int first_x = place.first_x - P::RADIUS + segment * P::SEGMENT;
        sweep_rows<P, false>(
            place,
            [&](int first_y) {
                const int pixels = height * width;
                const int dy_step = heads * P::HEAD_WIDTH * pixels;
                stage<P, P::PLANES, P::MEMBER, typename P::Element>({q_all, stride, 0.0f, queries},
                                                                    {dy_all, dy_step, 0.0f, gradients}, P::HEAD_WIDTH,
                                                                    first_y, first_x, place, sizes);
                // A query outside the image has weight exp2(-infinity) = 0.
                stage<P, 1, P::PLANE, float>({log2_sum, heads * pixels, POSITIVE_INFINITY, log2_sums},
                                             {delta_all, heads * pixels, 0.0f, deltas}, 1, first_y, first_x, place,
                                             sizes);
            },
            [&](int a, int y, int row) {
                float weights[P::PIXELS][P::SEGMENT], ds[P::PIXELS][P::SEGMENT] = {};
#pragma unroll
                for (int p = 0; p < P::PIXELS; ++p) {
#pragma unroll
                    for (int b = 0; b < P::SEGMENT; ++b) {
                        const int offset = segment * P::SEGMENT + b, x = place.x + p + offset - P::RADIUS;
                        weights[p][b] = 0.0f;
                        if constexpr (P::POSITION) {
                            if (place.lane == 0 && offset < P::KERNEL_SIZE && x >= 0 && x < width) {
                                weights[p][b] =
                                    read(column_logits_all + place.plane(P::KERNEL_SIZE),
                                         (P::KERNEL_SIZE - 1 - offset) * place.pixels + y * width + x);
                            }
                        }
                    }
                }
                float keys[P::PIXELS][P::CHANNELS];
#pragma unroll
                for (int c = 0; c < P::CHANNELS; ++c) {
                    const int channel = place.channel(c);
                    float r = 0.0f;
                    if constexpr (P::POSITION) {
                        if (channel < P::ROW_HALF) {
                            r = LOG2_E *
                                relative<P>(rel_row, rel_col, place.head, channel, P::KERNEL_SIZE - 1 - a);
                        }
                    }
#pragma unroll
                    for (int p = 0; p < P::PIXELS; ++p) keys[p][c] = k[p][c] + r;
                }
                correlate<P>(keys, queries, place, row, weights);
                correlate<P>(v, gradients, place, row, ds);
                float log2_line[P::LINE], delta_line[P::LINE];
                const int line = place.member * P::PLANE + row * P::PITCH + place.column * P::PIXELS;
                read_line<P>(log2_sums + line, log2_line);
                read_line<P>(deltas + line, delta_line);
#pragma unroll
                for (int p = 0; p < P::PIXELS; ++p) {
                    sum_over_lanes<P>(weights[p]);
                    sum_over_lanes<P>(ds[p]);
#pragma unroll
                    for (int b = 0; b < P::SEGMENT; ++b) {
                        const bool in_window = segment * P::SEGMENT + b < P::KERNEL_SIZE;
                        weights[p][b] = in_window ? exp2f(weights[p][b] - log2_line[p + b]) : 0.0f;
                        ds[p][b] = weights[p][b] * (ds[p][b] - delta_line[p + b]);
                    }
                }
                accumulate<P>(ds, queries, place, row + reload, dk);
                accumulate<P>(weights, gradients, place, row + reload, dv);
            });
    }
    const long long to = sizes.map(place.image, P::HEAD_WIDTH, d_stride);
    write_own<P>(dk_all + to, place, dk);
    write_own<P>(dv_all + to, place, dv);
}

constexpr int SUM_COLUMNS = 32, SUM_ROWS = 8;

// Adds the partial sums of backward_queries over the batch and the tiles: drel_row [heads, HEAD_WIDTH / 2,
// KERNEL_SIZE], drel_col [heads, HEAD_WIDTH - HEAD_WIDTH / 2, KERNEL_SIZE].
// Grid: heads * ceil(HEAD_WIDTH * KERNEL_SIZE / SUM_COLUMNS) blocks of SUM_COLUMNS * SUM_ROWS threads.
template <class Element, int KERNEL_SIZE, int HEAD_WIDTH>
__global__ void __launch_bounds__(SUM_COLUMNS* SUM_ROWS)
    sum_positions(const float* __restrict__ partials, Element* __restrict__ drel_row, Element* __restrict__ drel_col,
                  int batch, int heads, int tiles) {
    constexpr int ENTRIES = HEAD_WIDTH * KERNEL_SIZE, GROUPS = (ENTRIES + SUM_COLUMNS - 1) / SUM_COLUMNS;
    constexpr int ROW_ENTRIES = HEAD_WIDTH / 2 * KERNEL_SIZE;
    SHARED_FLOATS(sums, SUM_ROWS * SUM_COLUMNS);
    const int head = static_cast<int>(blockIdx.x) / GROUPS;
    const int column = static_cast<int>(threadIdx.x) % SUM_COLUMNS, row = static_cast<int>(threadIdx.x) / SUM_COLUMNS;
    const int entry = static_cast<int>(blockIdx.x) % GROUPS * SUM_COLUMNS + column;
    float sum = 0.0f;
    if (entry < ENTRIES) {
        for (int n = row; n < batch * tiles; n += SUM_ROWS) {
            const long long block = (static_cast<long long>(n / tiles) * heads + head) * tiles + n % tiles;
            sum += read(partials + block * ENTRIES, entry);
        }
    }
    sums[row * SUM_COLUMNS + column] = sum;
    __syncthreads();
    if (row == 0 && entry < ENTRIES) {
        for (int n = 1; n < SUM_ROWS; ++n) sum += sums[n * SUM_COLUMNS + column];
        if (entry < ROW_ENTRIES) {
            write(drel_row, head * ROW_ENTRIES + entry, from_float<Element>(sum));
        } else {
            write(drel_col, head * (ENTRIES - ROW_ENTRIES) + entry - ROW_ENTRIES, from_float<Element>(sum));
        }
    }
}
