// Parts of a training step and of decoding on CPUs, loaded by native.py; what each computes stands as plain torch
// beside its caller (the modules of this folder). Here: pieces that are one pass over memory. In amx*.inc: whole
// attention, experts, projections, loss and Newton–Schulz steps where there are AMX tiles; in fp32_attention.inc
// attention without them, in fp32_gemm.inc products; in decode.inc a step of decoding.
//
// Plain C++17 that a compiler vectorises for the machine it runs on; no library but OpenMP's. Everything is computed in
// fp32 and rounded once, to the nearest even. Sums over a row, and over rows, have a fixed order for a given number of
// threads. T is float, or bf16 held in its 16 bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using bf16 = uint16_t;

// Begins at a cache line: loads that lie across two take twice as long, and those of tiles three times.
template <typename T>
struct AlignedAllocator : std::allocator<T> {
    template <typename U>
    struct rebind {
        using other = AlignedAllocator<U>;
    };
    T *allocate(size_t count) { return static_cast<T *>(operator new(count * sizeof(T), std::align_val_t(64))); }
    void deallocate(T *where, size_t) { operator delete(where, std::align_val_t(64)); }
};

template <typename T>
using Aligned = std::vector<T, AlignedAllocator<T>>;

static inline float load(float x) { return x; }

static inline float load(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline void store(float *where, float x) { *where = x; }

static inline void store(bf16 *where, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *where = bf16(x == x ? rounded : 0x7fc0);  // adding to a NaN's bits could make a number of it
}

template <typename T>
static inline float round_to(float x) {
    T rounded;
    store(&rounded, x);
    return load(rounded);
}

// exp(x) of x up to 88, to about 1 ulp: 2^n · e^r with |r| up to ln(2) / 2, by the polynomial of degree 6 that begins
// with 1 + r and is off by 3e-9 at most. NaN stays NaN; below -87, near the smallest normal number, it is 0.
static inline float exponential(float x) {
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the sum's low bits are the nearest integer
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
    float p = 1.38145394e-3f;
    p = p * r + 8.36874545e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;  // all that is not the integer is shifted out
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

// Exactly 0 from where exp(-x) would be too large: the largest gates times less than 1e-38 would still be something.
static inline float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

#define PARALLEL_ROWS _Pragma("omp parallel for num_threads(threads) schedule(static)")

// out[r] = weight[r] · silu(gate) · up, of rows h = [gate, up].
template <typename T>
static void swiglu(const T *h, const T *weight, T *out, int64_t rows, int64_t F, int threads) {
    PARALLEL_ROWS
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = h + r * 2 * F, *up = gate + F;
        T *y = out + r * F;
        float w = load(weight[r]);
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
            float g = load(gate[i]);
            store(y + i, w * (g * sigmoid(g) * load(up[i])));
        }
    }
}

// The gradients of h and, if not null, of the weights; and over `grad`, the gradient of the activation, the activation
// itself.
template <typename T>
static void swiglu_backward(const T *h, const T *weight, T *grad, T *grad_h, T *grad_weight, int64_t rows, int64_t F,
                            int threads) {
    PARALLEL_ROWS
    for (int64_t r = 0; r < rows; r++) {
        const T *gate = h + r * 2 * F, *up = gate + F;
        T *d = grad + r * F, *grad_gate = grad_h + r * 2 * F, *grad_up = grad_gate + F;
        float w = load(weight[r]), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < F; i++) {
            float g = load(gate[i]), u = load(up[i]), dy = load(d[i]), s = sigmoid(g), silu = g * s, weighted = dy * w;
            sum += dy * (silu * u);
            store(grad_gate + i, weighted * u * s * (1.0f + g * (1.0f - s)));  // 1 + g - silu would lose the 1
            store(grad_up + i, weighted * silu);
            store(d + i, w * (silu * u));
        }
        if (grad_weight) store(grad_weight + r, sum);
    }
}

// Softmax in place of scores[b, g, j, i, :keys], scaled, over the keys that query i sees: those of mask[b, i, :keys]
// (its rows mask_stride apart, its matrices mask_batch), or without a mask the first `offset` + i + 1. Others become 0.
template <typename T>
static void attention_softmax(T *scores, const uint8_t *mask, int64_t mask_batch, int64_t mask_stride, int64_t batch,
                              int64_t heads, int64_t queries, int64_t keys, int64_t offset, float scale, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(keys);
        float *w = wide.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * heads * queries; row++) {
            int64_t b = row / (heads * queries), i = row % queries;
            T *s = scores + row * keys;
            int64_t end = std::min(keys, offset + i + 1);
            const uint8_t *visible = mask ? mask + b * mask_batch + i * mask_stride : nullptr;
            if (mask) end = keys;
            float largest = -INFINITY, sum = 0.0f;
            if (mask) {
#pragma omp simd reduction(max : largest)
                for (int64_t j = 0; j < end; j++) {
                    float value = visible[j] ? load(s[j]) * scale : -INFINITY;
                    w[j] = value;
                    largest = value > largest ? value : largest;
                }
            } else {
#pragma omp simd reduction(max : largest)
                for (int64_t j = 0; j < end; j++) {
                    float value = load(s[j]) * scale;
                    w[j] = value;
                    largest = value > largest ? value : largest;
                }
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < end; j++) {
                w[j] = exponential(w[j] - largest);
                sum += w[j];
            }
            float inverse = 1.0f / sum;
#pragma omp simd
            for (int64_t j = 0; j < end; j++) store(s + j, w[j] * inverse);
            for (int64_t j = end; j < keys; j++) s[j] = 0;
        }
    }
}

// Over grad, the gradient of probabilities p, that of what the softmax is of: p · (grad - sum(p · grad)).
template <typename T>
static void attention_softmax_backward(T *grad, const T *p, int64_t rows, int64_t keys, int threads) {
    PARALLEL_ROWS
    for (int64_t r = 0; r < rows; r++) {
        T *d = grad + r * keys;
        const T *q = p + r * keys;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < keys; j++) sum += load(d[j]) * load(q[j]);
#pragma omp simd
        for (int64_t j = 0; j < keys; j++) store(d + j, load(q[j]) * (load(d[j]) - sum));
    }
}

constexpr int64_t IGNORED = -100;  // as in loss.py

// losses[r] = logsumexp(logits[r]) - logits[r, label]; over the logits, if wanted, softmax - onehot. Where the label is
// ignored both are 0.
template <typename T>
static void cross_entropy(T *logits, const int64_t *labels, float *losses, int64_t rows, int64_t V, int gradients,
                          int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(V);
        float *w = wide.data();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            T *x = logits + r * V;
            int64_t label = labels[r];
            if (label < 0 || label >= V) {  // what is no label at all must not go unnoticed, nor read beyond the row
                losses[r] = label == IGNORED ? 0.0f : NAN;
                if (gradients) std::memset(x, 0, V * sizeof(T));
                continue;
            }
            float largest = -INFINITY, sum = 0.0f, of_label = load(x[label]);
#pragma omp simd reduction(max : largest)
            for (int64_t j = 0; j < V; j++) {
                float value = load(x[j]);
                w[j] = value;
                largest = value > largest ? value : largest;  // std::max would be 15 times slower here
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < V; j++) {
                w[j] = exponential(w[j] - largest);
                sum += w[j];
            }
            losses[r] = std::log(sum) + (largest - of_label);
            if (!gradients) continue;
            float inverse = 1.0f / sum;
            w[label] -= sum;
#pragma omp simd
            for (int64_t j = 0; j < V; j++) store(x + j, w[j] * inverse);
        }
    }
}

// y = weight · round(x · inverse), inverse = 1 / sqrt(mean(x²) + eps).
template <typename T>
static void rms_norm(const T *x, const T *weight, T *y, float *inverses, int64_t rows, int64_t D, float eps,
                     int threads) {
    PARALLEL_ROWS
    for (int64_t r = 0; r < rows; r++) {
        const T *a = x + r * D;
        T *b = y + r * D;
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < D; i++) square += load(a[i]) * load(a[i]);
        float inverse = 1.0f / std::sqrt(square / float(D) + eps);
        inverses[r] = inverse;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) store(b + i, load(weight[i]) * round_to<T>(load(a[i]) * inverse));
    }
}

// grad_x = inverse · (weight · grad - n · mean(weight · grad · n)) with n = x · inverse; grad_weight [D] = Σ grad · n.
template <typename T>
static void rms_norm_backward(const T *grad, const T *x, const T *weight, const float *inverses, T *grad_x,
                              float *grad_weight, int64_t rows, int64_t D, int threads) {
    std::vector<float> partial(threads * D, 0.0f);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; part++) {
        float *of_weight = partial.data() + part * D;
        for (int64_t r = rows * part / threads; r < rows * (part + 1) / threads; r++) {
            const T *d = grad + r * D, *a = x + r * D;
            T *out = grad_x + r * D;
            float inverse = inverses[r], mean = 0.0f;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < D; i++) mean += load(d[i]) * load(weight[i]) * load(a[i]);
            mean *= inverse * inverse / float(D);
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
                float dy = load(d[i]), xi = load(a[i]);
                of_weight[i] += dy * xi * inverse;
                store(out + i, inverse * (dy * load(weight[i]) - xi * mean));
            }
        }
    }
    for (int64_t i = 0; i < D; i++) {
        grad_weight[i] = 0.0f;
        for (int part = 0; part < threads; part++) grad_weight[i] += partial[part * D + i];
    }
}

// y = x · cos + rotate_half(x) · sin for rows x[position, head, :H], or with sign -1 the transpose of that.
template <typename T>
static void rotary(const T *x, const T *cos, const T *sin, T *y, int64_t positions, int64_t heads, int64_t H,
                   float sign, int threads) {
    PARALLEL_ROWS
    for (int64_t t = 0; t < positions; t++) {
        const T *c = cos + t * H, *s = sin + t * H;
        int64_t half = H / 2;
        for (int64_t n = 0; n < heads; n++) {
            const T *a = x + (t * heads + n) * H;
            T *b = y + (t * heads + n) * H;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float first = load(a[i]), second = load(a[i + half]);
                store(b + i, first * load(c[i]) - sign * second * load(s[i]));
                store(b + i + half, second * load(c[i + half]) + sign * first * load(s[i + half]));
            }
        }
    }
}

// out[t] = Σ y[p] over the rows p whose token[p] is t, in their order.
template <typename T>
static void sum_of_tokens(const T *y, const int64_t *token, T *out, int64_t rows, int64_t tokens, int64_t D,
                          int threads) {
    std::vector<int64_t> ends(tokens + 1, 0), sorted(rows);
    for (int64_t p = 0; p < rows; p++) ends[token[p] + 1]++;
    for (int64_t t = 0; t < tokens; t++) ends[t + 1] += ends[t];
    for (int64_t p = rows; p-- > 0;) sorted[--ends[token[p] + 1]] = p;  // which makes each end a beginning
    ends.push_back(rows);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(D);
        float *sum = sums.data();
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; t++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t place = ends[t + 1]; place < ends[t + 2]; place++) {
                const T *row = y + sorted[place] * D;
#pragma omp simd
                for (int64_t i = 0; i < D; i++) sum[i] += load(row[i]);
            }
            T *to = out + t * D;
#pragma omp simd
            for (int64_t i = 0; i < D; i++) store(to + i, sum[i]);
        }
    }
}

// The sum of squares of x, into `sum`: in fp32 over some thousand values, and those in fp64.
template <typename T>
static void sum_of_squares(const T *x, double *sum, int64_t count, int threads) {
    constexpr int64_t part = 4096;
    std::vector<double> partial(threads, 0.0);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t start = thread * part; start < count; start += threads * part) {
            float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = start; i < std::min(count, start + part); i++) squares += load(x[i]) * load(x[i]);
            partial[thread] += squares;
        }
    *sum = std::accumulate(partial.begin(), partial.end(), 0.0);
}

// AdamW: p ← keep · p - rate · m / (sqrt(v) · root + eps), m and v being the running means of g · scale and its square,
// which take new1 and new2 of it; 1 - beta in fp32 would be off by 1e-5 for a beta of 0.999.
template <typename T>
static void adamw(float *p, const T *g, float *m, float *v, int64_t count, float scale, float keep, float rate,
                  float new1, float beta2, float new2, float root, float eps, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float gradient = load(g[i]) * scale;
        m[i] += new1 * (gradient - m[i]);
        v[i] = beta2 * v[i] + new2 * gradient * gradient;
        p[i] = keep * p[i] - rate * m[i] / (std::sqrt(v[i]) * root + eps);
    }
}

// m ← beta · m + rest · g · scale, rest = 1 - beta, and once more with g · scale, which is what `ahead` gets.
template <typename T>
static void nesterov(const T *g, float *m, bf16 *ahead, int64_t count, float beta, float rest, float scale,
                     int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float gradient = load(g[i]) * scale, mean = m[i] + rest * (gradient - m[i]);
        m[i] = mean;
        store(ahead + i, gradient + beta * (mean - gradient));
    }
}

// x ← keep · x + scale · d.
extern "C" void decay_and_add(float *x, const bf16 *d, int64_t count, float keep, float scale, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) x[i] = keep * x[i] + scale * load(d[i]);
}

// begins[b, i]: the first key that mask[b, i, :] shows. Returns 1 where every query i sees all keys from there to its
// own, and none begins before those of the query before it.
extern "C" int mask_begins(const uint8_t *mask, int32_t *begins, int64_t B, int64_t S, int threads) {
    int contiguous = 1;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(& : contiguous)
    for (int64_t row = 0; row < B * S; row++) {
        const uint8_t *visible = mask + row * S;
        int64_t i = row % S, begin = 0;
        int32_t count = 0;
        while (begin < i && !visible[begin]) begin++;
        for (int64_t j = 0; j < S; j++) count += visible[j];
        int32_t between = 0;
        for (int64_t j = begin; j <= i; j++) between += visible[j];
        begins[row] = int32_t(begin);
        contiguous &= count == between && between == i + 1 - begin;
    }
    for (int64_t row = 0; row + 1 < B * S; row++) contiguous &= (row + 1) % S == 0 || begins[row] <= begins[row + 1];
    return contiguous;
}

#define EXPORT(T)                                                                                                      \
    void swiglu_##T(const T *h, const T *weight, T *out, int64_t rows, int64_t F, int threads) {                       \
        swiglu(h, weight, out, rows, F, threads);                                                                      \
    }                                                                                                                  \
    void swiglu_backward_##T(const T *h, const T *weight, T *grad, T *grad_h, T *grad_weight, int64_t rows, int64_t F, \
                             int threads) {                                                                            \
        swiglu_backward(h, weight, grad, grad_h, grad_weight, rows, F, threads);                                       \
    }                                                                                                                  \
    void attention_softmax_##T(T *scores, const uint8_t *mask, int64_t mask_batch, int64_t mask_stride, int64_t batch, \
                               int64_t heads, int64_t queries, int64_t keys, int64_t offset, float scale,              \
                               int threads) {                                                                          \
        attention_softmax(scores, mask, mask_batch, mask_stride, batch, heads, queries, keys, offset, scale, threads); \
    }                                                                                                                  \
    void attention_softmax_backward_##T(T *grad, const T *p, int64_t rows, int64_t keys, int threads) {                \
        attention_softmax_backward(grad, p, rows, keys, threads);                                                      \
    }                                                                                                                  \
    void cross_entropy_##T(T *logits, const int64_t *labels, float *losses, int64_t rows, int64_t V, int gradients,    \
                           int threads) {                                                                              \
        cross_entropy(logits, labels, losses, rows, V, gradients, threads);                                            \
    }                                                                                                                  \
    void rms_norm_##T(const T *x, const T *weight, T *y, float *inverses, int64_t rows, int64_t D, float eps,          \
                      int threads) {                                                                                   \
        rms_norm(x, weight, y, inverses, rows, D, eps, threads);                                                       \
    }                                                                                                                  \
    void rms_norm_backward_##T(const T *grad, const T *x, const T *weight, const float *inverses, T *grad_x,           \
                               float *grad_weight, int64_t rows, int64_t D, int threads) {                             \
        rms_norm_backward(grad, x, weight, inverses, grad_x, grad_weight, rows, D, threads);                           \
    }                                                                                                                  \
    void sum_of_tokens_##T(const T *y, const int64_t *token, T *out, int64_t rows, int64_t tokens, int64_t D,          \
                           int threads) {                                                                              \
        sum_of_tokens(y, token, out, rows, tokens, D, threads);                                                        \
    }                                                                                                                  \
    void sum_of_squares_##T(const T *x, double *sum, int64_t count, int threads) {                                     \
        sum_of_squares(x, sum, count, threads);                                                                        \
    }                                                                                                                  \
    void adamw_##T(float *p, const T *g, float *m, float *v, int64_t count, float scale, float keep, float rate,       \
                   float new1, float beta2, float new2, float root, float eps, int threads) {                          \
        adamw(p, g, m, v, count, scale, keep, rate, new1, beta2, new2, root, eps, threads);                            \
    }                                                                                                                  \
    void nesterov_##T(const T *g, float *m, bf16 *ahead, int64_t count, float beta, float rest, float scale,           \
                      int threads) {                                                                                   \
        nesterov(g, m, ahead, count, beta, rest, scale, threads);                                                      \
    }                                                                                                                  \
    void rotary_##T(const T *x, const T *cos, const T *sin, T *y, int64_t positions, int64_t heads, int64_t H,         \
                    float sign, int threads) {                                                                         \
        rotary(x, cos, sin, y, positions, heads, H, sign, threads);                                                    \
    }

extern "C" {
EXPORT(float)
EXPORT(bf16)
}

#ifdef __AMX_BF16__
#include "amx.inc"
#include "amx_attention.inc"
#include "amx_experts.inc"
#include "amx_linear.inc"
#include "amx_loss.inc"
#include "amx_newton_schulz.inc"
#endif

#include "few_rows.inc"
#include "fp32_gemm.inc"
#include "fp32_attention.inc"
#include "decode.inc"
