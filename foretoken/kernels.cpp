// One decoding step of a Llama-family model on a CPU: few rows, so its time is the reading of the weights.
//
// PyTorch launches some 20 operations a block and its matrix products are made for many rows; here a whole forward, or a
// whole chain of drafts, is one parallel region. `model.Stepper` is the readable twin; `native.py` compiles and calls this.
//
// Every number of a row is summed in the same order whatever other rows stand beside it. So a token's logits do not
// depend on how many tokens were drafted, on the batch, or on the number of threads, and in bfloat16, too,
// speculative decoding gives exactly the plain output.
//
// Letters: R items (token positions) of a forward, D width, N heads, H head width, F width of the MLP, V vocabulary.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// A tile of a product keeps OUTS x ROWS vectors of sums in registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, OUTS = 4, ROWS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, OUTS = 4, ROWS = 2;
#else
constexpr int LANES = 4, OUTS = 4, ROWS = 4;
#endif

#define UNROLL _Pragma("GCC unroll 8")  // so that arrays of vectors stay in registers

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = x == x ? uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) : 0x7FC0;
}

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vec load(const bf16* p) {
#if defined(__AVX512F__)  // GCC would convert it in two halves
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    halves h;
    std::memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
#endif
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// a * b + c, rounded once where the machine can; written out, so that a sum is not rounded as its surroundings suggest.
inline vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int j = 0; j < LANES; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
#else
    return a * b + c;
#endif
}

inline float sum(vec v) {
    float a[LANES];
    store(a, v);
    for (int w = LANES / 2; w; w /= 2)
        for (int j = 0; j < w; ++j) a[j] += a[j + w];
    return a[0];
}

// The largest of `count` numbers, behind which a vector of -inf stands.
inline float maximum(const float* x, int64_t count) {
    vec most = load(x);
    for (int64_t i = LANES; i < count; i += LANES) {
        const vec v = load(x + i);
        most = v > most ? v : most;
    }
    float a[LANES];
    store(a, most);
    return *std::max_element(a, a + LANES);
}

// Sums of the vectors of each column: acc (OUTS, R) -> out (R, OUTS).
template <int R>
inline void sums(const vec (&acc)[OUTS][R], float (*out)[OUTS]) {
#if defined(__AVX512F__)
    __m512 rows[R];  // two transposing additions in every 128-bit lane, then the lanes
    UNROLL for (int r = 0; r < R; ++r) {
        const __m512 a = (__m512)acc[0][r], b = (__m512)acc[1][r], c = (__m512)acc[2][r], d = (__m512)acc[3][r];
        const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        rows[r] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
    }
    UNROLL for (int r = 0; r < R; r += 4) {
        const __m512 a = rows[r], b = rows[r + 1 < R ? r + 1 : r];
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const __m512 c = rows[r + 2 < R ? r + 2 : r], d = rows[r + 3 < R ? r + 3 : r];
        const __m512 cd = r + 2 < R ? _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE)) : ab;
        const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
        const int count = R - r < 4 ? R - r : 4;
        _mm512_mask_storeu_ps(out[r], __mmask16((1u << (4 * count)) - 1), all);
    }
#else
    for (int r = 0; r < R; ++r)
        for (int o = 0; o < OUTS; ++o) out[r][o] = sum(acc[o][r]);
#endif
}

// exp to 2 ulp, 0 below -87: range reduction to [-ln 2 / 2, ln 2 / 2] and the Taylor polynomial of degree 7.
inline vec exp(vec x) {
    const ivec small = x < -87.0f, large = x > 88.0f;
    x = small ? vec{} - 87.0f : large ? vec{} + 88.0f : x;
    const vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    const vec n = shifted - 12582912.0f;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = vec{} + 1.0f / 5040;
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, vec{} + c);
    const vec y = (vec)((ivec)p + ((ivec)shifted << 23));
    return small ? vec{} : y;
}

// What the activations of a product are: beside bfloat16 weights, where the machine multiplies pairs of them, the same.
template <class W>
struct Beside {
    typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct Beside<bf16> {
    typedef bf16 type;
};
#endif

template <int R>
inline void multiply(const float* const* w, int64_t n, const float* x, int64_t ldx, int64_t& i, vec (&acc)[OUTS][R]) {
    for (; i + LANES <= n; i += LANES) {
        vec v[R];
        UNROLL for (int r = 0; r < R; ++r) v[r] = load(x + r * ldx + i);
        UNROLL for (int o = 0; o < OUTS; ++o) {
            const vec weight = load(w[o] + i);
            __builtin_prefetch(w[o] + 2 * OUTS * n + i);
            UNROLL for (int r = 0; r < R; ++r) acc[o][r] = fma(weight, v[r], acc[o][r]);
        }
    }
}
template <int R>
inline void multiply(const bf16* const* w, int64_t n, const float* x, int64_t ldx, int64_t& i, vec (&acc)[OUTS][R]) {
    for (; i + LANES <= n; i += LANES) {
        vec v[R];
        UNROLL for (int r = 0; r < R; ++r) v[r] = load(x + r * ldx + i);
        UNROLL for (int o = 0; o < OUTS; ++o) {
            const vec weight = load(w[o] + i);
            __builtin_prefetch(w[o] + 2 * OUTS * n + i);
            UNROLL for (int r = 0; r < R; ++r) acc[o][r] = fma(weight, v[r], acc[o][r]);
        }
    }
}
#if defined(__AVX512BF16__)
template <int R>
inline void multiply(const bf16* const* w, int64_t n, const bf16* x, int64_t ldx, int64_t& i, vec (&acc)[OUTS][R]) {
    for (; i + 32 <= n; i += 32) {
        __m512bh v[R];
        UNROLL for (int r = 0; r < R; ++r) v[r] = (__m512bh)_mm512_loadu_si512(x + r * ldx + i);
        UNROLL for (int o = 0; o < OUTS; ++o) {
            const __m512bh weight = (__m512bh)_mm512_loadu_si512(w[o] + i);
            __builtin_prefetch(w[o] + 2 * OUTS * n + i);
            UNROLL for (int r = 0; r < R; ++r) acc[o][r] = (vec)_mm512_dpbf16_ps((__m512)acc[o][r], weight, v[r]);
        }
    }
}
#endif

// Four rows of weights (n) times R rows of x (R, ldx) -> out (R, 4).
template <int R, class W, class A>
inline void tile(const W* const* w, int64_t n, const A* x, int64_t ldx, float (*out)[OUTS]) {
    vec acc[OUTS][R] = {};
    int64_t i = 0;
    multiply<R>(w, n, x, ldx, i, acc);
    sums<R>(acc, out);
    for (int64_t j = i; j < n; ++j)
        for (int r = 0; r < R; ++r)
            for (int o = 0; o < OUTS; ++o) out[r][o] += widen(w[o][j]) * widen(x[r * ldx + j]);
}

template <class W, class A>
inline void tiles(const W* const* w, int64_t n, const A* x, int64_t ldx, int rows, float (*out)[OUTS]) {
    switch (rows) {
        case 1: return tile<1>(w, n, x, ldx, out);
        case 2: return tile<2>(w, n, x, ldx, out);
#if !defined(__AVX__) || defined(__AVX512F__)
        case 3: return tile<3>(w, n, x, ldx, out);
        case 4: return tile<4>(w, n, x, ldx, out);
#endif
    }
}

// emit(o, r, x[r] . w[o]) for outputs o in [begin, end) and rows r in [0, rows).
template <class W, class A, class Emit>
void product(const W* w, int64_t n, int64_t begin, int64_t end, const A* x, int64_t ldx, int64_t rows, Emit emit) {
    float out[ROWS][OUTS];
    const W* weights[OUTS];
    const int64_t chunks = (rows + ROWS - 1) / ROWS, each = (rows + chunks - 1) / chunks;  // 5 rows are 3 and 2, not 4 and 1
    for (int64_t o = begin; o < end; o += OUTS) {
        const int outs = int(std::min<int64_t>(OUTS, end - o));
        for (int a = 0; a < OUTS; ++a) weights[a] = w + std::min(o + a, end - 1) * n;  // beyond the end: not emitted
        for (int64_t r = 0; r < rows; r += each) {
            const int count = int(std::min(each, rows - r));
            tiles(weights, n, x + r * ldx, ldx, count, out);
            for (int b = 0; b < count; ++b)
                if (outs == OUTS)
                    for (int a = 0; a < OUTS; ++a) emit(o + a, r + b, out[b][a]);
                else
                    for (int a = 0; a < outs; ++a) emit(o + a, r + b, out[b][a]);
        }
    }
}

}  // namespace

extern "C" {

// The structures are mirrored field by field in native.py.

struct Model {
    int64_t bfloat16, threads, width, heads, kv_heads, head_dim, mlp, vocabulary;
    double eps;
    const void *embedding, *unembedding, *norm;  // (V, D), (V, D), (D)
    const float *cos, *sin;                      // (positions, H), the first half of sin negative
};

// Weights as torch.nn.Linear has them (out, in); pointers that a block has no use for are null.
struct Layer {
    const void *qkv, *qkv_bias, *o, *gate_up, *down;
    const void *norm_1, *norm_2, *q_norm, *k_norm, *hidden_norm;
    void *keys, *values;  // (rows, kv_heads, capacity, H)
    int64_t capacity;
};

// Item i is a token at rotary position position[i]. Its keys go to `slot[i]` of cache row `row[i]`; it sees the slots
// below base[i], and of those behind them slot base[i] + j if bit j of seen[i] is set. Items of a row stand together.
struct Items {
    int64_t count;
    const int64_t *token, *row, *slot, *position, *base;
    const uint64_t* seen;
};

// A step for each of `rows` rows: `tokens` tokens each, the last committed one and its drafts, and then `drafts` new ones.
// How rows of logits become tokens: the argmax of logits + temperature x Gumbel noise keyed by (seed, position, token);
// position[row] is the absolute one of the token behind the row's first.
struct Turn {
    int64_t rows, tokens, drafts, rejection;
    double temperature;
    const int64_t *token, *length, *draft_length, *seed, *position;  // (rows, tokens); lengths of the caches' rows
    int64_t *picked, *accepted, *draft;                              // (rows, tokens), (rows), (rows, drafts)
    float* logprob;                                                  // (rows, tokens)
    // With rejection: logits (rows, tokens - 1, V) and (rows, drafts, V) that the old and the new drafts come from.
    const float* proposed;
    float* proposal;
};
}

namespace {

// Memory on a cache line's bound, so that a vector never lies on two; nothing in it is set.
template <class T>
class Buffer {
    T* at;

  public:
    explicit Buffer(int64_t count) : at((T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(at); }
    T* data() { return at; }
    T& operator[](int64_t i) { return at[i]; }
};

// The part [begin, end) of `count` that this thread does, in multiples of `unit`.
struct Part {
    int64_t begin, end;
    Part(int64_t count, int64_t unit = 1) {
        const int64_t threads = omp_get_num_threads(), units = (count + unit - 1) / unit;
        const int64_t each = (units + threads - 1) / threads * unit;
        begin = std::min(count, each * omp_get_thread_num());
        end = std::min(count, begin + each);
    }
};

inline void barrier() {
#pragma omp barrier
}

// y = x / rms(x) * weight for one row.
template <class W, class A>
void normalise(const float* x, const W* weight, int64_t n, double eps, A* y) {
    vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / float(n) + float(eps));
    for (i = 0; i < n; ++i) narrow(x[i] * scale * widen(weight[i]), y[i]);
}

template <class W>
class Runner {
    typedef typename Beside<W>::type A;
    static constexpr int64_t FEW = 8;
    const Model& m;
    const int64_t D, N, G, H, F, Q;  // G: key/value heads; Q: width of queries, keys and values together
    Buffer<A> input, mixed, hidden;
    Buffer<float> qkv, gate_up;

  public:
    Runner(const Model& model, int64_t rows)
        : m(model), D(m.width), N(m.heads), G(m.kv_heads), H(m.head_dim), F(m.mlp), Q((N + 2 * G) * H),
          input(std::max(rows, FEW * model.threads) * 2 * D), mixed(rows * N * H), hidden(rows * F), qkv(rows * Q), gate_up(rows * 2 * F) {}

    // x (R, D), in place. `embedded`: a block that reads the tokens' embeddings beside x.
    void block(const Layer& l, const Items& items, float* x, bool embedded) {
        const int64_t R = items.count, in = embedded ? 2 * D : D, threads = omp_get_num_threads();
        A* read = prepare(R, in, [&](int64_t r, A* row) {
            if (!embedded) return normalise(x + r * D, (const W*)l.norm_1, D, m.eps, row);
            float token[D];
            embed(items.token[r], token);
            normalise(token, (const W*)l.norm_1, D, m.eps, row);
            normalise(x + r * D, (const W*)l.hidden_norm, D, m.eps, row + D);
        });
        const W* bias = (const W*)l.qkv_bias;
        auto project = [&, out = qkv.data(), width = Q](int64_t begin, int64_t end) {
            product((const W*)l.qkv, in, begin, end, read, in, R, [=](int64_t o, int64_t r, float y) {
                out[r * width + o] = bias ? y + widen(bias[o]) : y;
            });
        };
        if (G % threads == 0) {  // a thread projects what its own heads attend with
            const int64_t each = G / threads, first = each * omp_get_thread_num(), end = first + each, group = N / G;
            project(first * group * H, end * group * H);
            project((N + first) * H, (N + end) * H);
            project((N + G + first) * H, (N + G + end) * H);
        } else {
            const Part q(Q, OUTS);
            project(q.begin, q.end);
            barrier();
        }
        attention(l, items);
        barrier();
        const Part d(D, OUTS);
        product((const W*)l.o, N * H, d.begin, d.end, mixed.data(), N * H, R,
                [x, width = D](int64_t o, int64_t r, float y) { x[r * width + o] += y; });
        barrier();
        read = prepare(R, D, [&](int64_t r, A* row) { normalise(x + r * D, (const W*)l.norm_2, D, m.eps, row); });
        const Part f(F, OUTS);
        auto keep = [both = gate_up.data(), width = 2 * F](int64_t o, int64_t r, float y) { both[r * width + o] = y; };
        product((const W*)l.gate_up, D, f.begin, f.end, read, D, R, keep);
        product((const W*)l.gate_up, D, F + f.begin, F + f.end, read, D, R, keep);
        for (int64_t r = 0; r < R; ++r) gate(gate_up.data() + r * 2 * F, f, hidden.data() + r * F);
        barrier();
        product((const W*)l.down, F, d.begin, d.end, hidden.data(), F, R,
                [x, width = D](int64_t o, int64_t r, float y) { x[r * width + o] += y; });
        barrier();
    }

    void embed(int64_t token, float* x) const {
        const W* row = (const W*)m.embedding + token * D;
        for (int64_t i = 0; i < D; ++i) x[i] = widen(row[i]);
    }

    // States (rows, D) -> logits (rows, V), normalised first.
    void logits(const float* states, int64_t rows, float* out) {
        A* read = prepare(rows, D, [&](int64_t r, A* row) { normalise(states + r * D, (const W*)m.norm, D, m.eps, row); });
        const Part v(m.vocabulary, OUTS);
        product((const W*)m.unembedding, D, v.begin, v.end, read, D, rows,
                [out, width = m.vocabulary](int64_t o, int64_t r, float y) { out[r * width + o] = y; });
        barrier();
    }

  private:
    // Rows (R, width) that fill(r, row) makes, for all threads. Of few rows each thread makes its own: no waiting.
    template <class Fill>
    A* prepare(int64_t R, int64_t width, Fill fill) {
        if (R <= FEW) {
            A* mine = input.data() + omp_get_thread_num() * FEW * 2 * D;
            for (int64_t r = 0; r < R; ++r) fill(r, mine + r * width);
            return mine;
        }
        for (Part p(R); p.begin < p.end; ++p.begin) fill(p.begin, input.data() + p.begin * width);
        barrier();
        return input.data();
    }

    // silu(gate) * up for the outputs of one part.
    void gate(const float* row, Part f, A* y) const {
        for (int64_t i = f.begin; i < f.end; i += LANES) {
            float g[LANES] = {}, out[LANES];
            const int64_t count = std::min<int64_t>(LANES, f.end - i);
            std::memcpy(g, row + i, count * sizeof(float));
            const vec v = load(g);
            store(out, v / (1.0f + exp(-v)));
            for (int64_t j = 0; j < count; ++j) narrow(out[j] * row[F + i + j], y[i + j]);
        }
    }

    // Rotary embedding of one head (Hugging Face's layout), normalised first where the model does so.
    template <class Out>
    void rotate(float* x, const void* norm, int64_t position, Out* y) const {
        if (norm) normalise(x, (const W*)norm, H, m.eps, x);
        const float *cos = m.cos + position * H, *sin = m.sin + position * H;
        const int64_t half = H / 2;
        for (int64_t i = 0; i < half; ++i) narrow(x[i] * cos[i] + x[i + half] * sin[i], y[i]);
        for (int64_t i = half; i < H; ++i) narrow(x[i] * cos[i] + x[i - half] * sin[i], y[i]);
    }

    // One unit of work is a key/value head of a cache row: who writes its keys also reads them.
    void attention(const Layer& l, const Items& items) {
        int64_t unit = 0;
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const bool own = G % threads == 0;
        for (int64_t first = 0, end; first < items.count; first = end) {
            for (end = first + 1; end < items.count && items.row[end] == items.row[first];) ++end;
            for (int64_t g = 0; g < G; ++g, ++unit)
                if ((own ? g / (G / threads) : unit % threads) == me) attend(l, items, first, end, g);
        }
    }

    void attend(const Layer& l, const Items& items, int64_t first, int64_t end, int64_t g) {
        const int64_t group = N / G, count = end - first, from = (items.row[first] * G + g) * l.capacity * H;
        W *keys = (W*)l.keys + from, *values = (W*)l.values + from;
        const int64_t slots = *std::max_element(items.slot + first, items.slot + end) + 1, room = slots + LANES;
        Buffer<A> query_memory(count * group * H);
        Buffer<float> score_memory(count * group * room + H);
        A* queries = query_memory.data();
        float *scores = score_memory.data(), *result = scores + count * group * room;
        for (int64_t i = first; i < end; ++i) {
            float* row = qkv.data() + i * Q;
            rotate(row + (N + g) * H, l.k_norm, items.position[i], keys + items.slot[i] * H);
            for (int64_t j = 0; j < H; ++j) narrow(row[(N + G + g) * H + j], values[items.slot[i] * H + j]);
            for (int64_t q = 0; q < group; ++q)
                rotate(row + (g * group + q) * H, l.q_norm, items.position[i],
                       queries + ((i - first) * group + q) * H);
        }
        const float scale = 1.0f / std::sqrt(float(H));
        product((const W*)keys, H, 0, slots, queries, H, count * group,
                [=](int64_t s, int64_t q, float y) { scores[q * room + s] = y * scale; });
        for (int64_t i = first; i < end; ++i) {
            int64_t own[64], others = 0;
            for (int64_t j = 0; items.base[i] + j < slots && j < 64; ++j)
                if (items.seen[i] >> j & 1) own[others++] = items.base[i] + j;
            for (int64_t q = 0; q < group; ++q) {
                mix(scores + ((i - first) * group + q) * room, items.base[i], own, others, values, result);
                A* y = mixed.data() + i * N * H + (g * group + q) * H;
                for (int64_t j = 0; j < H; ++j) narrow(result[j], y[j]);
            }
        }
    }

    // softmax of the scores of slots [0, base) and `own`, in this order, times their values.
    void mix(float* scores, int64_t base, const int64_t* own, int64_t others, const W* values, float* y) const {
        const int64_t count = base + others;
        for (int64_t j = base; j < count; ++j) scores[j] = scores[own[j - base]];  // own[j - base] >= j
        for (int64_t j = count; j < count + LANES; ++j) scores[j] = -INFINITY;
        const float most = maximum(scores, count);
        vec total = {};
        for (int64_t j = 0; j < count; j += LANES) {
            const vec e = exp(load(scores + j) - most);
            store(scores + j, e);
            total += e;
        }
        const float share = 1.0f / sum(total);
        int64_t i = 0;
        for (; i + 4 * LANES <= H; i += 4 * LANES) weigh<4>(scores, base, count, own, values + i, share, y + i);
        for (; i + LANES <= H; i += LANES) weigh<1>(scores, base, count, own, values + i, share, y + i);
        for (; i < H; ++i) {
            float z = 0;
            for (int64_t j = 0; j < count; ++j) z += scores[j] * widen(values[(j < base ? j : own[j - base]) * H + i]);
            y[i] = z * share;
        }
    }

    // C vectors of the values' weighted sum; several slots at a time, so that no addition waits for the one before.
    template <int C>
    void weigh(const float* shares, int64_t base, int64_t count, const int64_t* own, const W* values,
               float share, float* y) const {
        constexpr int U = (LANES < 8 ? LANES : 8) / C;  // the zeros behind the shares reach as far
        vec acc[U][C] = {};
        int64_t j = 0;
        for (; j + U <= base; j += U)
            UNROLL for (int u = 0; u < U; ++u)
                UNROLL for (int c = 0; c < C; ++c) acc[u][c] = fma(vec{} + shares[j + u], load(values + (j + u) * H + c * LANES), acc[u][c]);
        for (; j < count; j += U)
            UNROLL for (int u = 0; u < U; ++u) {
                const int64_t slot = j + u < base ? j + u : j + u < count ? own[j + u - base] : 0;  // its share is 0
                UNROLL for (int c = 0; c < C; ++c) acc[u][c] = fma(vec{} + shares[j + u], load(values + slot * H + c * LANES), acc[u][c]);
            }
        UNROLL for (int u = 1; u < U; ++u)
            UNROLL for (int c = 0; c < C; ++c) acc[0][c] += acc[u][c];
        for (int c = 0; c < C; ++c) store(y + c * LANES, acc[0][c] * share);
    }
};

inline uint64_t mix64(uint64_t x) {  // splitmix64's step, as in sampling.py
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// The token of one row of logits. A token can only win where 1 - u <= -log u <= exp(-(best - logit) / temperature), u
// its uniform number; the logarithms are taken of those tokens alone.
int64_t pick(const float* logits, int64_t V, double temperature, uint64_t seed, uint64_t position) {
    int64_t winner = std::max_element(logits, logits + V) - logits;
    if (temperature == 0) return winner;
    const uint64_t key = mix64(mix64(seed) ^ position);
    auto noisy = [&](int64_t v) {
        const double u = (double((mix64(key ^ uint64_t(v)) >> 12)) + 0.5) / double(1ull << 52);
        return logits[v] + float(temperature * -std::log(-std::log(u)));
    };
    float best = noisy(winner);
    for (int64_t v = 0; v < V; v += LANES) {
        float gap[LANES] = {}, bound[LANES], rest[LANES];
        const int64_t count = std::min<int64_t>(LANES, V - v);
        std::memcpy(gap, logits + v, count * sizeof(float));
        store(bound, exp((load(gap) - best) * float(1 / temperature)) * 1.001f);
        for (int j = 0; j < LANES; ++j)  // 1 - u: the complement of the 52 bits
            rest[j] = float(int64_t(~mix64(key ^ uint64_t(v + j)) >> 12)) * 0x1p-52f;
        for (int64_t j = 0; j < count; ++j) {
            if (rest[j] > bound[j]) continue;
            const float value = noisy(v + j);
            if (value > best || (value == best && v + j < winner)) best = value, winner = v + j;
        }
    }
    return winner;
}

constexpr uint64_t DRAFT = 0xD1B54A32D192ED03u;  // as in sampling.py

// softmax(logits / temperature), token by token.
struct Softmax {
    const float* logits;
    float most;
    double scale, total = 0;
    Softmax(const float* x, int64_t V, double temperature)
        : logits(x), most(*std::max_element(x, x + V)), scale(1 / temperature) {
        for (int64_t v = 0; v < V; ++v) total += std::exp(float((x[v] - most) * scale));
    }
    double operator()(int64_t v) const { return std::exp(float((logits[v] - most) * scale)) / total; }
};

// Chen et al. 2023: accept a draft with min(1, p / q), else draw from the positive part of p - q. Picks the tokens of
// one row, logits (count + 1, V), and says how many of its drafts they begin with.
int64_t reject(const float* logits, const float* proposed, const int64_t* drafts, int64_t count, int64_t V,
               double temperature, uint64_t seed, uint64_t position, int64_t* picked) {
    for (int64_t k = 0; k < count; ++k) {
        const Softmax p(logits + k * V, V, temperature), q(proposed + k * V, V, temperature);
        const double u = (double(mix64(mix64(mix64(seed) ^ (position + k)) ^ uint64_t(V)) >> 12) + 0.5) / double(1ull << 52);
        picked[k] = drafts[k];
        if (u * q(drafts[k]) < p(drafts[k])) continue;
        std::vector<float> rest(V);
        bool some = false;
        for (int64_t v = 0; v < V; ++v) {
            const double more = p(v) - q(v);
            rest[v] = more > 0 ? float(std::log(more)) : -INFINITY;
            some = some || more > 0;
        }
        picked[k] = some ? pick(rest.data(), V, 1, seed, position + k)
                         : pick(logits + k * V, V, temperature, seed, position + k);
        return k;
    }
    picked[count] = pick(logits + count * V, V, temperature, seed, position + count);
    return count;
}

float log_probability(const float* logits, int64_t V, int64_t token) {
    const float most = *std::max_element(logits, logits + V);
    vec total = {};
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES) total += exp(load(logits + v) - most);
    double rest = sum(total);
    for (; v < V; ++v) rest += std::exp(logits[v] - most);
    return logits[token] - most - float(std::log(rest));
}

// Items that are made here: chains behind what the caches hold.
struct Chain {
    std::vector<int64_t> token, row, slot, base;
    std::vector<uint64_t> seen;
    void push(int64_t id, int64_t r, int64_t start, int64_t index) {
        token.push_back(id), row.push_back(r), slot.push_back(start + index), base.push_back(start);
        seen.push_back((uint64_t(2) << index) - 1);
    }
    Items items() const {
        return {int64_t(token.size()), token.data(), row.data(), slot.data(), slot.data(), base.data(), seen.data()};
    }
};

template <class W>
class Turner {
    const Model& m;
    const Turn& t;
    const int64_t B, T, K, D, V;
    Runner<W> run;
    Chain verified, kept, next;
    Buffer<float> z, hidden, states, scores;
    std::vector<int64_t> last;  // the kept item of each row from which its drafts start

  public:
    Turner(const Model& model, const Turn& turn)
        : m(model), t(turn), B(t.rows), T(t.tokens), K(t.drafts), D(m.width), V(m.vocabulary), run(m, B * (T + K)),
          z(B * T * D), hidden(B * (T + K) * D), states(B * (T + K) * D), scores(B * (T + K) * V), last(B) {
        for (int64_t i = 0; i < B * T; ++i) verified.push(t.token[i], i / T, t.length[i / T], i % T);
    }

    // In a parallel region, like what it calls.
    void go(const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter) {
        const Items items = verified.items();
        for (Part p(B * T); p.begin < p.end; ++p.begin) run.embed(items.token[p.begin], z.data() + p.begin * D);
        barrier();
        for (int64_t l = 0; l < trunk; ++l) run.block(layers[l], items, z.data(), false);
        const Part p(B * T * D);
        std::copy(z.data() + p.begin, z.data() + p.end, hidden.data() + p.begin);
        barrier();
        run.block(layers[trunk], items, hidden.data(), false);
        run.logits(hidden.data(), B * T, scores.data());
        for (int64_t b = omp_get_thread_num(); t.rejection && b < B; b += omp_get_num_threads())
            t.accepted[b] = reject(scores.data() + b * T * V, t.proposed + b * (T - 1) * V, t.token + b * T + 1, T - 1, V,
                                   t.temperature, t.seed[b], t.position[b], t.picked + b * T);
        if (t.rejection) barrier();
        for (int64_t i = omp_get_thread_num(); i < B * T; i += omp_get_num_threads()) {
            if (t.rejection && i % T > t.accepted[i / T]) continue;
            if (!t.rejection) t.picked[i] = pick(scores.data() + i * V, V, t.temperature, t.seed[i / T], t.position[i / T] + i % T);
            t.logprob[i] = log_probability(scores.data() + i * V, V, t.picked[i]);
        }
        barrier();
#pragma omp single
        accept(drafter ? t.draft_length : t.length);
        if (K && drafter) chain(*drafter);
        if (K && !drafter) branch(layers + trunk + 1, heads - 1);
    }

  private:
    void accept(const int64_t* lengths) {
        for (int64_t b = 0; b < B; ++b) {
            int64_t a = t.rejection ? t.accepted[b] : 0;
            while (!t.rejection && a + 1 < T && t.token[b * T + a + 1] == t.picked[b * T + a]) ++a;
            t.accepted[b] = a;
            for (int64_t i = 0; i <= a; ++i) kept.push(t.picked[b * T + i], b, lengths[b], i);
            last[b] = int64_t(kept.token.size()) - 1;
        }
    }

    // The trunk's output at the kept items.
    void start() {
        for (Part p(B); p.begin < p.end; ++p.begin) {
            const int64_t b = p.begin;
            const int64_t count = t.accepted[b] + 1;
            std::copy_n(z.data() + b * T * D, count * D, states.data() + (last[b] + 1 - count) * D);
        }
        barrier();
    }

    // A sequential head: its block on the kept items, then on its own drafts.
    void chain(const Layer& layer) {
        start();
        run.block(layer, kept.items(), states.data(), true);
        const Part p(B);
        for (int64_t b = p.begin; b < p.end; ++b)
            std::copy_n(states.data() + last[b] * D, D, hidden.data() + b * D);
        barrier();
        for (int64_t d = 0; d < K; ++d) {
            run.logits(hidden.data(), B, scores.data());
            for (int64_t b = p.begin; b < p.end; ++b) propose(scores.data() + b * V, b, d);
            barrier();
            if (d + 1 == K) break;
#pragma omp single
            {
                next = Chain();
                for (int64_t b = 0; b < B; ++b) next.push(t.draft[b * K + d], b, kept.slot[last[b]] + 1, d);
            }
            run.block(layer, next.items(), hidden.data(), true);
        }
    }

    // Parallel heads, each on the kept items.
    void branch(const Layer* layers, int64_t heads) {
        const Part p(B);
        for (int64_t h = 0; h < heads; ++h) {
            start();
            run.block(layers[h], kept.items(), states.data(), false);
            for (int64_t b = p.begin; b < p.end; ++b)
                std::copy_n(states.data() + last[b] * D, D, hidden.data() + (b * heads + h) * D);
            barrier();
        }
        run.logits(hidden.data(), B * heads, scores.data());
        for (int64_t i = omp_get_thread_num(); i < B * heads; i += omp_get_num_threads())
            propose(scores.data() + i * V, i / heads, i % heads);
    }

    void propose(const float* logits, int64_t b, int64_t d) {
        const uint64_t seed = uint64_t(t.seed[b]) ^ (t.rejection ? DRAFT : 0);
        t.draft[b * K + d] = pick(logits, V, t.temperature, seed, t.position[b] + t.accepted[b] + 1 + d);
        if (t.rejection) std::copy_n(logits, V, t.proposal + (b * K + d) * V);
    }
};

template <class W>
void forward(const Model& m, const Layer* layers, int64_t trunk, int64_t heads, const Items& items, float* z,
             float* hidden) {
    const int64_t R = items.count, D = m.width;
    Runner<W> run(m, R);
#pragma omp parallel num_threads(m.threads)
    {
        for (Part p(R); p.begin < p.end; ++p.begin) run.embed(items.token[p.begin], z + p.begin * D);
        barrier();
        for (int64_t l = 0; l < trunk; ++l) run.block(layers[l], items, z, false);
        for (int64_t h = 0; h < heads; ++h) {
            const Part p(R * D);
            std::copy(z + p.begin, z + p.end, hidden + h * R * D + p.begin);
            barrier();
            run.block(layers[trunk + h], items, hidden + h * R * D, false);
        }
    }
}

template <class W>
void draft(const Model& m, const Layer& layer, const Items& items, float* x) {
    Runner<W> run(m, items.count);
#pragma omp parallel num_threads(m.threads)
    run.block(layer, items, x, true);
}

template <class W>
void logits(const Model& m, const float* states, int64_t rows, float* out) {
    Runner<W> run(m, rows);
#pragma omp parallel num_threads(m.threads)
    run.logits(states, rows, out);
}

template <class W>
void turn(const Model& m, const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter, const Turn& t) {
    Turner<W> turner(m, t);
#pragma omp parallel num_threads(m.threads)
    turner.go(layers, trunk, heads, drafter);
}

}  // namespace

extern "C" {

// z (R, D): the trunk's output. hidden (heads, R, D): the heads' states. None of them normalised.
void foretoken_forward(const Model* m, const Layer* layers, int64_t trunk, int64_t heads, const Items* items, float* z,
                       float* hidden) {
    (m->bfloat16 ? forward<bf16> : forward<float>)(*m, layers, trunk, heads, *items, z, hidden);
}

// The block of a sequential head on x (R, D), in place.
void foretoken_draft(const Model* m, const Layer* layer, const Items* items, float* x) {
    (m->bfloat16 ? draft<bf16> : draft<float>)(*m, *layer, *items, x);
}

// Logits (rows, V) of states (rows, D).
void foretoken_logits(const Model* m, const float* states, int64_t rows, float* out) {
    (m->bfloat16 ? logits<bf16> : logits<float>)(*m, states, rows, out);
}

// A whole step: the forward, the target's tokens, how many drafts they accept, and the next drafts; of the block
// `drafter` if there is one, else of heads 2..heads. The drafter's cache then holds the accepted positions, and keys of
// drafts behind them.
void foretoken_turn(const Model* m, const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter,
                    const Turn* t) {
    (m->bfloat16 ? turn<bf16> : turn<float>)(*m, layers, trunk, heads, drafter, *t);
}
}
