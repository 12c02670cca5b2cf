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
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
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
constexpr int LANES = 16, OUTS = 4, ROWS = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, OUTS = 4, ROWS = 2;
#else
constexpr int LANES = 4, OUTS = 4, ROWS = 4;
#endif

#define UNROLL _Pragma("GCC unroll 8")  // so that arrays of vectors stay in registers
#define INLINE inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
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
inline void store(bf16* p, vec v) {
#if defined(__AVX512BF16__)
    const __m256bh h16 = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &h16, sizeof h16);
    return;
#endif
    const uvec bits = (uvec)v, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const halves h = __builtin_convertvector(v == v ? rounded : uvec{} + 0x7FC0, halves);
    std::memcpy(p, &h, sizeof h);
}

// One number, or LANES of them.
inline void put(float* p, float y) { *p = y; }
inline void put(float* p, vec y) { store(p, y); }
inline void add(float* p, float y) { *p += y; }
inline void add(float* p, vec y) { store(p, load(p) + y); }
template <class W>
inline float plus(float y, const W* p) { return y + widen(*p); }
template <class W>
inline vec plus(vec y, const W* p) { return y + load(p); }

template <class T>
inline void narrow_all(const float* x, int64_t n, T* y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
    for (; i < n; ++i) narrow(x[i], y[i]);
}

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
#if defined(__AVX512F__)  // in the same order
    const __m512d d = (__m512d)v;
    const __m256 e = _mm256_add_ps((__m256)_mm512_castpd512_pd256(d), (__m256)_mm512_extractf64x4_pd(d, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(e), _mm256_extractf128_ps(e, 1));
    const __m128 h = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#endif
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

// Where the largest of `count` numbers stands, the first of equals.
inline int64_t highest(const float* x, int64_t count) {
    vec most = vec{} - INFINITY;
    ivec where = {}, at = {};
    for (int j = 0; j < LANES; ++j) at[j] = j;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES, at += LANES) {
        const vec v = load(x + i);
        const ivec more = v > most;
        most = more ? v : most, where = more ? at : where;
    }
    int64_t best = where[0];
    for (int j = 0; j < LANES && i; ++j)
        if (most[j] > x[best] || (most[j] == x[best] && where[j] < best)) best = where[j];
    for (; i < count; ++i)
        if (x[i] > x[best]) best = i;
    return best;
}

// Sums of the vectors of each column: acc (OUTS, R) -> out (R, OUTS). As a call it would pass them through memory.
template <int R>
INLINE void sums(const vec (&acc)[OUTS][R], float (*out)[OUTS]) {
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
#if defined(__AVX512F__)
    const __m512 a = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-88.0f), (__m512)x));
    const __m512 whole = _mm512_roundscale_ps(a * 1.44269504f, 8);
    vec rest = fma((vec)whole, vec{} - 0.693359375f, (vec)a);
    rest = fma((vec)whole, vec{} + 2.12194440e-4f, rest);
    vec q = vec{} + 1.0f / 5040;
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) q = fma(q, rest, vec{} + c);
    return (vec)_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), (__m512)q, whole);
#endif
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

// Memory on a cache line's bound, so that a vector never lies on two; nothing in it is set.
template <class T>
class Buffer {
    T* at = nullptr;
    int64_t room = -1;

  public:
    explicit Buffer(int64_t count) { reserve(count); }
    Buffer(const Buffer&) = delete;
    ~Buffer() { std::free(at); }
    T* data() const { return at; }
    T* reserve(int64_t count) {  // what it held is lost
        if (count > room) {
            std::free(at);
            at = (T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64), room = count;
        }
        return at;
    }
    T& operator[](int64_t i) { return at[i]; }
};

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
            _mm_prefetch((const char*)(w[o] + i) + (R > 2 ? 2048 : 1024), _MM_HINT_T1);
            const __m512bh weight = (__m512bh)_mm512_loadu_si512(w[o] + i);
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
#if defined(__AVX512F__)
        case 5: return tile<5>(w, n, x, ldx, out);
        case 6: return tile<6>(w, n, x, ldx, out);
#endif
    }
}

// emit(o, r, x[r] . w[o]) for outputs o in [begin, end) and rows r in [0, rows). The four rows of weights that a tile reads
// are a quarter of the outputs apart: memory is read fastest as a few long streams.
template <class W, class A, class Emit>
void product(const W* w, int64_t n, int64_t begin, int64_t end, const A* x, int64_t ldx, int64_t rows, Emit emit) {
    float out[ROWS][OUTS];
    const W* weights[OUTS];
    const int64_t chunks = (rows + ROWS - 1) / ROWS, each = (rows + chunks - 1) / chunks;  // 5 rows are 3 and 2, not 4 and 1
    const int64_t apart = (end - begin + OUTS - 1) / OUTS;
    for (int64_t o = begin; o < begin + apart; ++o) {
        const int outs = int((end - o + apart - 1) / apart);
        for (int a = 0; a < OUTS; ++a) weights[a] = w + (a < outs ? o + a * apart : o) * n;  // beyond the end: not emitted
        for (int64_t r = 0; r < rows; r += each) {
            const int count = int(std::min(each, rows - r));
            tiles(weights, n, x + r * ldx, ldx, count, out);
            for (int b = 0; b < count; ++b)
                if (outs == OUTS)
                    for (int a = 0; a < OUTS; ++a) emit(o + a * apart, r + b, out[b][a]);
                else
                    for (int a = 0; a < outs; ++a) emit(o + a * apart, r + b, out[b][a]);
        }
    }
}

// Panels: a matrix once more, LANES outputs side by side, so that no sum goes across a vector, which with short rows costs as
// much as the multiplications. A word of a vector holds two bfloat16 of an output, or four bytes. Of bytes each panel ends in
// LANES factors and LANES corrections.
#if defined(__AVX512BF16__)
constexpr int PANEL = LANES;
#else
constexpr int PANEL = 0;
#endif
#if defined(__AVX512VNNI__)
constexpr int BYTES = LANES;
#else
constexpr int BYTES = 0;
#endif

// Rows of activations as bytes: x is nearly (byte - 128) * scale.
struct Rows8 {
    const uint8_t* at;
    const float* scale;
};

#if defined(__AVX512F__)
#if defined(__AVX512BF16__)
struct Pairs {
    typedef __m512 Sum;
    static constexpr int64_t EACH = 2, TAIL = 0, AHEAD = 0;  // numbers in a word, words behind a panel, bytes asked for ahead
    typedef const bf16* Rows;
    static const bf16* row(Rows x, int64_t i) { return x + i; }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
    static vec result(Sum a, Sum b, const int32_t*, Rows, int64_t) { return (vec)(a + b); }
};
#endif
#if defined(__AVX512VNNI__)
struct Quads {
    typedef __m512i Sum;
    static constexpr int64_t EACH = 4, TAIL = 2 * LANES, AHEAD = 1024;
    typedef Rows8 Rows;
    static const uint8_t* row(Rows x, int64_t i) { return x.at + i; }
    static Sum dot(Sum sum, __m512i w, __m512i x) { return _mm512_dpbusd_epi32(sum, x, w); }
    static vec result(Sum a, Sum b, const int32_t* tail, Rows x, int64_t r) {
        const __m512i whole = _mm512_sub_epi32(_mm512_add_epi32(a, b), _mm512_loadu_si512(tail + LANES));
        return (vec)_mm512_cvtepi32_ps(whole) * load((const float*)tail) * x.scale[r];
    }
};
#endif

// P panels times R rows of x, from row r on -> out. n is a multiple of two words.
template <class Kind, int P, int R>
INLINE void multiply_panels(const int32_t* const (&w)[P], int64_t n, typename Kind::Rows x, int64_t r, vec (&out)[R][P]) {
    typename Kind::Sum acc[2][R][P];
    UNROLL for (int b = 0; b < R; ++b)
        UNROLL for (int p = 0; p < P; ++p) acc[0][b][p] = acc[1][b][p] = typename Kind::Sum{};
    const int64_t words = n / Kind::EACH;
    for (int64_t i = 0; i < words; i += 2)
        UNROLL for (int h = 0; h < 2; ++h) {
            __m512i read[R];
            UNROLL for (int b = 0; b < R; ++b) {
                int32_t word;
                std::memcpy(&word, Kind::row(x, (r + b) * n + (i + h) * Kind::EACH), 4);
                read[b] = _mm512_set1_epi32(word);
            }
            UNROLL for (int p = 0; p < P; ++p) {
                if (Kind::AHEAD) _mm_prefetch((const char*)(w[p] + (i + h) * LANES) + Kind::AHEAD, _MM_HINT_T1);
                const __m512i weight = _mm512_loadu_si512(w[p] + (i + h) * LANES);
                UNROLL for (int b = 0; b < R; ++b) acc[h][b][p] = Kind::dot(acc[h][b][p], weight, read[b]);
            }
        }
    UNROLL for (int b = 0; b < R; ++b)
        UNROLL for (int p = 0; p < P; ++p)
            out[b][p] = Kind::result(acc[0][b][p], acc[1][b][p], w[p] + words * LANES, x, r + b);
}

// Where panels p, p + step, .. lie, of the one matrix or, in turn, of two that are `apart` panels apart.
template <class Kind, int P, int EACH, int R, class Emit>
void emit_panels(const int32_t* w, int64_t n, int64_t apart, int64_t p, int64_t step, typename Kind::Rows x, int64_t r,
                 Emit emit) {
    const int32_t* at[P];
    UNROLL for (int a = 0; a < P; ++a)
        at[a] = w + (p + a / EACH * step + a % EACH * apart) * (n / Kind::EACH * LANES + Kind::TAIL);
    vec out[R][P];
    multiply_panels<Kind, P, R>(at, n, x, r, out);
    UNROLL for (int b = 0; b < R; ++b)
        UNROLL for (int a = 0; a < P; a += EACH) emit(p + a / EACH * step, r + b, &out[b][a]);
}

// P / EACH panels at a time, so many streams through memory; returns the first panel that is left.
template <class Kind, int P, int EACH, class Emit>
int64_t some_panels(const int32_t* w, int64_t n, int64_t apart, int64_t begin, int64_t end, typename Kind::Rows x,
                    int64_t rows, int64_t each, Emit emit) {
    const int64_t step = (end - begin) / (P / EACH);
    for (int64_t p = begin; p < begin + step; ++p)
        for (int64_t r = 0; r < rows; r += each)
            switch (std::min(each, rows - r)) {
                case 1: emit_panels<Kind, P, EACH, 1>(w, n, apart, p, step, x, r, emit); break;
                case 2: emit_panels<Kind, P, EACH, 2>(w, n, apart, p, step, x, r, emit); break;
                case 3: emit_panels<Kind, P, EACH, 3>(w, n, apart, p, step, x, r, emit); break;
                case 4: emit_panels<Kind, P, EACH, 4>(w, n, apart, p, step, x, r, emit); break;
                case 5: emit_panels<Kind, P, EACH, 5>(w, n, apart, p, step, x, r, emit); break;
                case 6: emit_panels<Kind, P, EACH, 6>(w, n, apart, p, step, x, r, emit); break;
            }
    return begin + step * (P / EACH);
}

// emit(p, r, y) for panels p in [begin, end) and rows r: y[0] are the outputs of panel p, and y[1], where EACH is 2, those of
// panel p + apart.
template <class Kind, int EACH, class Emit>
void all_panels(const void* matrix, int64_t n, int64_t apart, int64_t begin, int64_t end, typename Kind::Rows x, int64_t rows,
                Emit emit) {
    const int32_t* w = (const int32_t*)matrix;
    const int64_t chunks = (rows + ROWS - 1) / ROWS, each = (rows + chunks - 1) / chunks;
    if (each <= 2) begin = some_panels<Kind, 4, EACH>(w, n, apart, begin, end, x, rows, each, emit);  // registers for more
    begin = some_panels<Kind, 2, EACH>(w, n, apart, begin, end, x, rows, each, emit);
    if constexpr (EACH == 1) some_panels<Kind, 1, EACH>(w, n, apart, begin, end, x, rows, each, emit);
}
#endif

template <int EACH, class Emit>
void panels(const void* w, int64_t n, int64_t apart, int64_t begin, int64_t end, const bf16* x, int64_t rows, Emit emit) {
#if defined(__AVX512BF16__)
    all_panels<Pairs, EACH>(w, n, apart, begin, end, x, rows, emit);
#endif
}
template <int EACH, class Emit>
void panels(const void* w, int64_t n, int64_t apart, int64_t begin, int64_t end, Rows8 x, int64_t rows, Emit emit) {
#if defined(__AVX512VNNI__)
    all_panels<Quads, EACH>(w, n, apart, begin, end, x, rows, emit);
#endif
}
template <int EACH, class Emit>  // float32 has none
void panels(const void*, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, Emit) {}

template <class T>
float largest(const T* x, int64_t n) {  // of the absolute values
    vec most = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const vec v = load(x + i), size = v < 0 ? -v : v;
        most = size > most ? size : most;
    }
    float a[LANES];
    store(a, most);
    float found = *std::max_element(a, a + LANES);
    for (; i < n; ++i) found = std::max(found, std::abs(widen(x[i])));
    return found;
}

// Rows x (rows, n) as bytes, n a multiple of LANES; the memory is this thread's until it asks again.
template <class T>
Rows8 bytes_of(const T* x, int64_t rows, int64_t n) {
    thread_local Buffer<uint8_t> memory(0);
    thread_local Buffer<float> scales(0);
    uint8_t* to = memory.reserve(rows * n);
    float* scale = scales.reserve(rows);
#if defined(__AVX512F__)
    for (int64_t r = 0; r < rows; ++r) {
        const float most = largest(x + r * n, n), inverse = most > 0 ? 127.0f / most : 0.0f;
        scale[r] = most / 127.0f;
        for (int64_t i = 0; i < n; i += LANES) {
            const __m512i whole = _mm512_cvtps_epi32((__m512)(load(x + r * n + i) * inverse));
            _mm_storeu_si128((__m128i*)(to + r * n + i), _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128))));
        }
    }
#endif
    return {to, scale};
}

// Scores (rows, room) of queries (rows, H) with the keys (slots, H) of one head.
template <class W, class A>
void multiply_keys_apart(const W* keys, int64_t H, int64_t slots, const A* queries, int64_t rows, float scale, int64_t room,
                         float* scores) {
    product(keys, H, 0, slots, queries, H, rows,
            [=](int64_t s, int64_t q, float y) { scores[q * room + s] = y * scale; });
}

#if defined(__AVX512F__)
// A word holds a float, or two bfloat16.
inline vec multiply_words(float, __m512i a, __m512i b, vec c) { return fma((vec)a, (vec)b, c); }
#if defined(__AVX512BF16__)
inline vec multiply_words(bf16, __m512i a, __m512i b, vec c) {
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
#endif

// 16 keys at a time, R queries. Four keys side by side hold word 4 l + k of each in lane l of vector k: so lanes are summed, at
// the end, of all 16 keys at once.
template <int R, class W>
inline void multiply_16_keys(const W* keys, int64_t H, int64_t slots, int64_t first, const W* queries, float scale,
                             int64_t room, float* scores) {
    constexpr int64_t EACH = 64 / sizeof(W);
    vec acc[R][4] = {};
    for (int64_t i = 0; i < H; i += EACH) {
        __m512i words[R][4];
        UNROLL for (int r = 0; r < R; ++r) {
            const __m512i q = _mm512_loadu_si512(queries + r * H + i);
            words[r][0] = _mm512_shuffle_epi32(q, _MM_PERM_AAAA), words[r][1] = _mm512_shuffle_epi32(q, _MM_PERM_BBBB);
            words[r][2] = _mm512_shuffle_epi32(q, _MM_PERM_CCCC), words[r][3] = _mm512_shuffle_epi32(q, _MM_PERM_DDDD);
        }
        UNROLL for (int f = 0; f < 4; ++f) {
            __m512i k[4];
            UNROLL for (int s = 0; s < 4; ++s)
                k[s] = _mm512_loadu_si512(keys + std::min(first + 4 * f + s, slots - 1) * H + i);
            const __m512i a = _mm512_unpacklo_epi32(k[0], k[1]), b = _mm512_unpackhi_epi32(k[0], k[1]);
            const __m512i c = _mm512_unpacklo_epi32(k[2], k[3]), d = _mm512_unpackhi_epi32(k[2], k[3]);
            k[0] = _mm512_unpacklo_epi64(a, c), k[1] = _mm512_unpackhi_epi64(a, c);
            k[2] = _mm512_unpacklo_epi64(b, d), k[3] = _mm512_unpackhi_epi64(b, d);
            UNROLL for (int j = 0; j < 4; ++j)
                UNROLL for (int r = 0; r < R; ++r) acc[r][f] = multiply_words(W(), k[j], words[r][j], acc[r][f]);
        }
    }
    UNROLL for (int r = 0; r < R; ++r) {
        const __m512 a = (__m512)acc[r][0], b = (__m512)acc[r][1], c = (__m512)acc[r][2], d = (__m512)acc[r][3];
        const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
        const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
        const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
        store(scores + r * room + first, (vec)all * scale);
    }
}

// Where rows of keys are whole vectors: keys become columns, so that no sum goes across a vector.
template <class W>
void multiply_keys(const W* keys, int64_t H, int64_t slots, const W* queries, int64_t rows, float scale, int64_t room,
                   float* scores) {
    if (H * sizeof(W) % 64) return multiply_keys_apart(keys, H, slots, queries, rows, scale, room, scores);
    constexpr decltype(&multiply_16_keys<1, W>) of[] = {multiply_16_keys<1, W>, multiply_16_keys<2, W>,
                                                        multiply_16_keys<3, W>, multiply_16_keys<4, W>,
                                                        multiply_16_keys<5, W>, multiply_16_keys<6, W>};
    const int64_t chunks = (rows + ROWS - 1) / ROWS, each = (rows + chunks - 1) / chunks;  // each turns the keys anew
    for (int64_t first = 0; first < slots; first += 16)
        for (int64_t q = 0; q < rows; q += each)
            of[std::min(each, rows - q) - 1](keys, H, slots, first, queries + q * H, scale, room, scores + q * room);
}
#endif

template <class W, class A>
void multiply_keys(const W* keys, int64_t H, int64_t slots, const A* queries, int64_t rows, float scale, int64_t room,
                   float* scores) {
    multiply_keys_apart(keys, H, slots, queries, rows, scale, room, scores);
}

}  // namespace

extern "C" {

// The structures are mirrored field by field in native.py.

struct Model {
    int64_t bfloat16, packed, bytes, threads, width, heads, kv_heads, head_dim, mlp, vocabulary;
    double eps;
    const void *embedding, *unembedding, *draft_unembedding, *norm;  // (V, D), (V, D), (V, D) in bytes, (D)
    const float *cos, *sin;                      // (positions, H), the first half of sin negative
};

// Weights as torch.nn.Linear has them (out, in), or as panels; pointers that a block has no use for are null. bytes: the
// matrices are panels of bytes, which drafts alone may come from.
struct Layer {
    int64_t bytes;
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

// A step for each of `rows` rows: `tokens` tokens each, the last committed one and its drafts as a tree, and then new
// drafts for `drafts` places, `ranks` candidates each, all of them among the first `draft_vocabulary` tokens. Token i
// hangs on token parent[i] < i, parent[0] is not read.
// How rows of logits become tokens: the argmax of logits + temperature x Gumbel noise keyed by (seed, position, token)
// among those that the filters keep (top_k 0, top_p 1, min_p 0: all); position[row] is the absolute one of the token
// behind the row's first.
struct Turn {
    int64_t rows, tokens, drafts, ranks, rejection, draft_vocabulary, top_k;
    double temperature, top_p, min_p;
    const int64_t *token, *length, *draft_length, *seed, *position, *parent;  // (rows, tokens); lengths of the caches
    int64_t *picked, *path, *accepted, *draft;  // (rows, tokens) along the accepted path, (rows), (rows, drafts, ranks)
    float* logprob;                             // (rows, tokens) along the accepted path
    // With rejection: logits (rows, tokens - 1, V) and (rows, drafts, V) that the old and the new drafts come from.
    const float* proposed;
    float* proposal;
    // For a block that drafts: the trunk's output (rows, D) at the position before `token`, one a row, which is known to
    // be the target's, as behind a prompt. Nothing is verified.
    const float* state;
};
}

namespace {

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

// Where the threads of a region wait for each other: some 20 ns, where OpenMP's takes 300.
class Barrier {
    std::atomic<int> arrived{0}, turn{0};

  public:
    void wait() {
        const int threads = omp_get_num_threads(), now = turn.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
            return;
        }
        for (int tries = 0; turn.load(std::memory_order_acquire) == now; tries += tries < 2200)
            if (tries < 2000) pause();
            else if (tries < 2200) std::this_thread::yield();  // others want the processor
            else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
};

// y = x / rms(x) * weight for one row.
template <class W, class A>
void normalise(const float* x, const W* weight, int64_t n, double eps, A* y) {
    vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / float(n) + float(eps));
    for (i = 0; i + LANES <= n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; ++i) narrow(x[i] * scale * widen(weight[i]), y[i]);
}

template <class W>
class Runner {
    typedef typename Beside<W>::type A;
    static constexpr int64_t FEW = 8;
    const Model& m;
    const int64_t D, N, G, H, F, Q, unit;  // G: key/value heads; Q: width of queries, keys and values together
    Barrier all;
    Buffer<A> input, mixed, hidden;
    Buffer<float> qkv, gate_up;

  public:
    Runner(const Model& model, int64_t rows)
        : m(model), D(m.width), N(m.heads), G(m.kv_heads), H(m.head_dim), F(m.mlp), Q((N + 2 * G) * H), unit(model.packed || model.bytes ? LANES : OUTS),
          input(std::max(rows, FEW * model.threads) * 2 * D), mixed(rows * N * H), hidden(rows * F), qkv(rows * Q), gate_up(rows * 2 * F) {}

    void barrier() { all.wait(); }

    // x (R, D), in place. `embedded`: a block that reads the tokens' embeddings beside x. Of items before `from` keys
    // and values are all that is made; what they give stays as it was.
    void block(const Layer& l, const Items& items, float* x, bool embedded, int64_t from = 0) {
        const int64_t in = embedded ? 2 * D : D, threads = omp_get_num_threads();
        A* read = prepare(items.count, in, [&](int64_t r, A* row) {
            if (!embedded) return normalise(x + r * D, (const W*)l.norm_1, D, m.eps, row);
            float token[D];
            embed(items.token[r], token);
            normalise(token, (const W*)l.norm_1, D, m.eps, row);
            normalise(x + r * D, (const W*)l.hidden_norm, D, m.eps, row + D);
        });
        const W* bias = (const W*)l.qkv_bias;
        auto project = [&, width = Q](int64_t begin, int64_t end, int64_t first) {
            float* out = qkv.data() + first * width;
            multiply(l.qkv, l.bytes, in, begin, end, read + first * in, items.count - first, [=](int64_t o, int64_t r, auto y) {
                put(out + r * width + o, bias ? plus(y, bias + o) : y);
            });
        };
        if (G % threads == 0) {  // a thread projects what its own heads attend with
            const int64_t each = G / threads, first = each * omp_get_thread_num(), end = first + each, group = N / G;
            project(first * group * H, end * group * H, from);
            project((N + first) * H, (N + end) * H, 0);
            project((N + G + first) * H, (N + G + end) * H, 0);
        } else {
            const Part q(N * H, unit), kv(2 * G * H, unit);
            project(q.begin, q.end, from);
            project(N * H + kv.begin, N * H + kv.end, 0);
            barrier();
        }
        attention(l, items, from);
        barrier();
        const int64_t R = items.count - from;
        x += from * D;
        const Part d(D, unit), f(F, unit);
        auto residual = [x, width = D](int64_t o, int64_t r, auto y) { add(x + r * width + o, y); };
        multiply(l.o, l.bytes, N * H, d.begin, d.end, mixed.data() + from * N * H, R, residual);
        barrier();
        read = prepare(R, D, [&](int64_t r, A* row) { normalise(x + r * D, (const W*)l.norm_2, D, m.eps, row); });
        gated(l.gate_up, l.bytes, f, read, R);
        barrier();
        multiply(l.down, l.bytes, F, d.begin, d.end, hidden.data(), R, residual);
        barrier();
    }

    void embed(int64_t token, float* x) const {
        const W* row = (const W*)m.embedding + token * D;
        for (int64_t i = 0; i < D; ++i) x[i] = widen(row[i]);
    }

    // States (rows, D) -> logits (rows, vocabulary) of the first tokens, normalised first. drafts: bytes will do.
    void logits(const float* states, int64_t rows, int64_t vocabulary, float* out, bool drafts = false) {
        A* read = prepare(rows, D, [&](int64_t r, A* row) { normalise(states + r * D, (const W*)m.norm, D, m.eps, row); });
        const Part v(vocabulary, unit);
        const bool bytes = drafts && m.bytes;
        multiply(bytes ? m.draft_unembedding : m.unembedding, bytes, D, v.begin, v.end, read, rows,
                 [=](int64_t o, int64_t r, auto y) { put(out + r * vocabulary + o, y); });
        barrier();
    }

  private:
    // emit(o, r, y) for the outputs o of rows x (rows, n); with panels LANES of them at once where they are whole.
    template <class Emit>
    void multiply(const void* w, bool bytes, int64_t n, int64_t begin, int64_t end, const A* x, int64_t rows, Emit emit) const {
        if (!m.packed && !bytes) return product((const W*)w, n, begin, end, x, n, rows, emit);
        if (begin == end) return;  // behind the vocabulary, whose last panel is another's
        auto parted = [=](int64_t p, int64_t r, const vec* y) {
            if ((p + 1) * LANES <= end) return emit(p * LANES, r, *y);
            for (int64_t o = p * LANES; o < end; ++o) emit(o, r, (*y)[o % LANES]);
        };
        if (bytes) return panels<1>(w, n, 0, begin / LANES, (end + LANES - 1) / LANES, bytes_of(x, rows, n), rows, parted);
        panels<1>(w, n, 0, begin / LANES, (end + LANES - 1) / LANES, x, rows, parted);
    }

    // silu(gate) * up of one part.
    void gated(const void* w, bool bytes, Part f, const A* x, int64_t R) {
        auto join = [=](int64_t p, int64_t r, const vec* y) {
            store(hidden.data() + r * F + p * LANES, y[0] / (1.0f + exp(-y[0])) * y[1]);
        };
        if (bytes) return panels<2>(w, D, F / LANES, f.begin / LANES, f.end / LANES, bytes_of(x, R, D), R, join);
        if (m.packed) return panels<2>(w, D, F / LANES, f.begin / LANES, f.end / LANES, x, R, join);
        auto keep = [both = gate_up.data(), width = 2 * F](int64_t o, int64_t r, float y) { both[r * width + o] = y; };
        product((const W*)w, D, f.begin, f.end, x, D, R, keep);
        product((const W*)w, D, F + f.begin, F + f.end, x, D, R, keep);
        for (int64_t r = 0; r < R; ++r) gate(gate_up.data() + r * 2 * F, f, hidden.data() + r * F);
    }

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
        int64_t i = f.begin;
        for (; i + LANES <= f.end; i += LANES) {
            const vec v = load(row + i);
            store(y + i, v / (1.0f + exp(-v)) * load(row + F + i));
        }
        if (i == f.end) return;
        float both[2][LANES] = {};
        A out[LANES];
        for (int64_t j = i; j < f.end; ++j) both[0][j - i] = row[j], both[1][j - i] = row[F + j];
        const vec v = load(both[0]);
        store(out, v / (1.0f + exp(-v)) * load(both[1]));
        std::copy_n(out, f.end - i, y + i);
    }

    // Rotary embedding of one head (Hugging Face's layout), normalised first where the model does so.
    template <class Out>
    void rotate(float* x, const void* norm, int64_t position, Out* y) const {
        if (norm) normalise(x, (const W*)norm, H, m.eps, x);
        const float *cos = m.cos + position * H, *sin = m.sin + position * H;
        const int64_t half = H / 2;
        if (half % LANES == 0) {
            for (int64_t i = 0; i < half; i += LANES) {
                const vec a = load(x + i), b = load(x + half + i);
                store(y + i, a * load(cos + i) + b * load(sin + i));
                store(y + half + i, b * load(cos + half + i) + a * load(sin + half + i));
            }
            return;
        }
        for (int64_t i = 0; i < half; ++i) narrow(x[i] * cos[i] + x[i + half] * sin[i], y[i]);
        for (int64_t i = half; i < H; ++i) narrow(x[i] * cos[i] + x[i - half] * sin[i], y[i]);
    }

    // One unit of work is a key/value head of a cache row: who writes its keys also reads them.
    void attention(const Layer& l, const Items& items, int64_t from) {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const bool own = G % threads == 0;
        for (int64_t first = 0, end; first < items.count; first = end) {
            for (end = first + 1; end < items.count && items.row[end] == items.row[first];) ++end;
            for (int64_t g = 0; g < G; ++g)
                if ((own ? g / (G / threads) : (items.row[first] * G + g) % threads) == me)
                    attend(l, items, first, end, std::clamp(from, first, end), g);
        }
    }

    // Items `first` to `end` of a cache row are kept, and those from `asks` on ask.
    void attend(const Layer& l, const Items& items, int64_t first, int64_t end, int64_t asks, int64_t g) {
        const int64_t group = N / G, rows = (end - asks) * group, from = (items.row[first] * G + g) * l.capacity * H;
        W *keys = (W*)l.keys + from, *values = (W*)l.values + from;
        const int64_t slots = *std::max_element(items.slot + first, items.slot + end) + 1;
        const int64_t room = (slots + 2 * LANES - 1) / LANES * LANES;
        thread_local Buffer<A> query_memory(0);
        thread_local Buffer<float> score_memory(0);
        A* queries = query_memory.reserve(rows * H);
        float *scores = score_memory.reserve(rows * (room + 1 + H)), *totals = scores + rows * room, *y = totals + rows;
        for (int64_t i = first; i < end; ++i) {
            float* row = qkv.data() + i * Q;
            rotate(row + (N + g) * H, l.k_norm, items.position[i], keys + items.slot[i] * H);
            narrow_all(row + (N + G + g) * H, H, values + items.slot[i] * H);
            for (int64_t q = 0; q < group && i >= asks; ++q)
                rotate(row + (g * group + q) * H, l.q_norm, items.position[i], queries + ((i - asks) * group + q) * H);
        }
        if (rows == 0) return;
        const float scale = 1.0f / std::sqrt(float(H));
        multiply_keys((const W*)keys, H, slots, (const A*)queries, rows, scale, room, scores);
        for (int64_t q = 0; q < rows; ++q)
            totals[q] = softmax(scores + q * room, slots, items.base[asks + q / group], items.seen[asks + q / group]);
        for (int64_t q = 0; q < rows; q += ROWS) mix(scores + q * room, room, slots, values, int(std::min<int64_t>(ROWS, rows - q)), y + q * H);
        for (int64_t q = 0; q < rows; ++q) {
            A* to = mixed.data() + (asks + q / group) * N * H + (g * group + q % group) * H;
            int64_t j = 0;
            for (; j + LANES <= H; j += LANES) store(to + j, load(y + q * H + j) / totals[q]);
            for (; j < H; ++j) narrow(y[q * H + j] / totals[q], to[j]);
        }
    }

    // Scores of `slots` slots -> their weights in place, 0 where a slot is not seen; returns the weights' sum. It is
    // taken over the slots that are seen, in their order: what else stands in the cache does not change it.
    static float softmax(float* scores, int64_t slots, int64_t base, uint64_t seen) {
        int64_t own[64], count = base;
        for (int64_t j = 0; base + j < slots && j < 64; ++j)
            if (seen >> j & 1) scores[count] = scores[base + j], own[count++ - base] = base + j;
        for (int64_t j = count; j < count + LANES; ++j) scores[j] = -INFINITY;
        const float most = maximum(scores, count);
        vec total = {};
        for (int64_t j = 0; j < count; j += LANES) {
            const vec e = exp(load(scores + j) - most);
            store(scores + j, e);
            total += e;
        }
        for (int64_t j = count; j < slots; ++j) scores[j] = 0;
        for (int64_t j = count - 1; j >= base && own[j - base] != j; --j)
            scores[own[j - base]] = scores[j], scores[j] = 0;
        return sum(total);
    }

    // Values of `slots` slots, summed with the weights of `rows` rows: y (rows, H).
    void mix(const float* weights, int64_t room, int64_t slots, const W* values, int rows, float* y) const {
        switch (rows) {
            case 1: return mix_rows<1>(weights, room, slots, values, y);
            case 2: return mix_rows<2>(weights, room, slots, values, y);
#if !defined(__AVX__) || defined(__AVX512F__)
            case 3: return mix_rows<3>(weights, room, slots, values, y);
            case 4: return mix_rows<4>(weights, room, slots, values, y);
#endif
#if defined(__AVX512F__)
            case 5: return mix_rows<5>(weights, room, slots, values, y);
            case 6: return mix_rows<6>(weights, room, slots, values, y);
#endif
        }
    }

    template <int R>
    void mix_rows(const float* weights, int64_t room, int64_t slots, const W* values, float* y) const {
        int64_t i = 0;
        for (; i + 4 * LANES <= H; i += 4 * LANES) weigh<R, 4>(weights, room, slots, values + i, y + i);
        for (; i + 2 * LANES <= H; i += 2 * LANES) weigh<R, 2>(weights, room, slots, values + i, y + i);
        for (; i + LANES <= H; i += LANES) weigh<R, 1>(weights, room, slots, values + i, y + i);
        for (int r = 0; i < H && r < R; ++r) {
            float* rest = y + r * H;
            std::fill(rest + i, rest + H, 0.0f);
            for (int64_t s = 0; s < slots; ++s)
                for (int64_t j = i; j < H; ++j) rest[j] += weights[r * room + s] * widen(values[s * H + j]);
        }
    }

    // C vectors of R rows. A sum goes from slot to slot: slots with weight 0 leave no trace in it.
    template <int R, int C>
    void weigh(const float* weights, int64_t room, int64_t slots, const W* values, float* y) const {
        vec acc[R][C] = {};
        for (int64_t s = 0; s < slots; ++s) {
            vec v[C];
            UNROLL for (int c = 0; c < C; ++c) v[c] = load(values + s * H + c * LANES);
            UNROLL for (int r = 0; r < R; ++r) {
                const vec weight = vec{} + weights[r * room + s];
                UNROLL for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, v[c], acc[r][c]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) store(y + r * H + c * LANES, acc[r][c]);
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
    int64_t winner = highest(logits, V);
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

bool filters(const Turn& t) { return t.temperature > 0 && (t.top_k || t.top_p < 1 || t.min_p > 0); }

// Makes -inf of the logits (V) that a filter drops, as `filtered` in sampling.py does.
void filter(float* logits, int64_t V, const Turn& t) {
    const float most = logits[highest(logits, V)];
    std::vector<float> share(V);
    double total = 0, before = 0;
    for (int64_t v = 0; v < V; ++v) total += share[v] = std::exp(float((logits[v] - most) / t.temperature));
    if (!std::isfinite(total)) return;  // logits that are no numbers cannot be put in order
    if (t.top_k && t.top_k < V) {
        std::vector<float> ordered(logits, logits + V);
        std::nth_element(ordered.begin(), ordered.begin() + (t.top_k - 1), ordered.end(), std::greater<float>());
        for (int64_t v = 0; v < V; ++v)
            if (logits[v] < ordered[t.top_k - 1]) total -= share[v], share[v] = 0, logits[v] = -INFINITY;
    }
    if (t.top_p < 1) {
        std::vector<int64_t> order;  // without the tail of those so unlikely that together they are below 1 - top_p
        for (int64_t v = 0; v < V; ++v) {
            if (share[v] * V >= (1 - t.top_p) * total) order.push_back(v);
            else logits[v] = -INFINITY;
        }
        std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return share[a] > share[b] || (share[a] == share[b] && a < b);
        });
        for (int64_t v : order) {
            if (before >= t.top_p * total) logits[v] = -INFINITY;
            before += share[v];
        }
    }
    for (int64_t v = 0; v < V; ++v)
        if (share[v] < t.min_p) logits[v] = -INFINITY;
}

constexpr uint64_t DRAFT = 0xD1B54A32D192ED03u;  // as in sampling.py

// softmax(logits / temperature).
class Softmax {
    std::vector<float> shares;
    double total = 0;

  public:
    Softmax(const float* logits, int64_t V, double temperature) : shares((V + LANES - 1) / LANES * LANES, -INFINITY) {
        const float most = logits[highest(logits, V)], scale = float(1 / temperature);
        std::copy_n(logits, V, shares.begin());
        for (int64_t v = 0; v < V; v += LANES) store(&shares[v], exp((load(&shares[v]) - most) * scale));
        for (int64_t v = 0; v < V; ++v) total += shares[v];
    }
    double operator()(int64_t v) const { return shares[v] / total; }
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
    const float most = logits[highest(logits, V)];
    vec total = {};
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES) total += exp(load(logits + v) - most);
    double rest = sum(total);
    for (; v < V; ++v) rest += std::exp(logits[v] - most);
    return logits[token] - most - float(std::log(rest));
}

// Items that are made here, behind what the caches hold.
struct Further {
    std::vector<int64_t> token, row, slot, position, base;
    std::vector<uint64_t> seen;
    void push(int64_t id, int64_t r, int64_t start, int64_t index, int64_t depth, uint64_t ancestors) {
        token.push_back(id), row.push_back(r), slot.push_back(start + index), position.push_back(start + depth);
        base.push_back(start), seen.push_back(ancestors);
    }
    void push(int64_t id, int64_t r, int64_t start, int64_t index) {  // of a chain
        push(id, r, start, index, index, (uint64_t(2) << index) - 1);
    }
    Items items() const {
        return {int64_t(token.size()), token.data(), row.data(), slot.data(), position.data(), base.data(), seen.data()};
    }
};

template <class W>
class Turner {
    const Model& m;
    const Turn& t;
    const int64_t B, T, K, D, V, M;  // M: tokens that drafts are among
    Runner<W> run;
    Further verified, kept;
    std::vector<int64_t> depth;     // of the tree's nodes
    Buffer<float> z, hidden, states, scores, kept_scores;
    int64_t before = 0;  // kept items from which no drafts start: they come first, then those from which they do, one a row

  public:
    Turner(const Model& model, const Turn& turn)
        : m(model), t(turn), B(t.rows), T(t.tokens), K(t.drafts), D(m.width), V(m.vocabulary), M(t.draft_vocabulary),
          run(m, B * (T + K)), z(B * T * D), hidden(B * (T + K) * D), states(B * (T + K) * D), scores(B * (T + K) * V),
          kept_scores(filters(t) ? B * T * V : 0) {
        std::vector<uint64_t> ancestors;
        for (int64_t i = 0; i < T; ++i) {
            depth.push_back(i ? depth[t.parent[i]] + 1 : 0);
            ancestors.push_back((i ? ancestors[t.parent[i]] : 0) | uint64_t(1) << i);
        }
        for (int64_t i = 0; i < B * T; ++i)
            verified.push(t.token[i], i / T, t.length[i / T], i % T, depth[i % T], ancestors[i % T]);
    }

    // In a parallel region, like what it calls.
    void go(const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter) {
        if (t.state) return begin(*drafter);
        const Items items = verified.items();
        for (Part p(B * T); p.begin < p.end; ++p.begin) run.embed(items.token[p.begin], z.data() + p.begin * D);
        run.barrier();
        for (int64_t l = 0; l < trunk; ++l) run.block(layers[l], items, z.data(), false);
        const Part p(B * T * D);
        std::copy(z.data() + p.begin, z.data() + p.end, hidden.data() + p.begin);
        run.barrier();
        run.block(layers[trunk], items, hidden.data(), false);
        run.logits(hidden.data(), B * T, V, scores.data());
        const float* laws = scores.data();
        if (filters(t)) {
            for (int64_t i = omp_get_thread_num(); i < B * T; i += omp_get_num_threads())
                filter(std::copy_n(laws + i * V, V, kept_scores.data() + i * V) - V, V, t);
            laws = kept_scores.data();
            run.barrier();
        }
        for (int64_t b = omp_get_thread_num(); t.rejection && b < B; b += omp_get_num_threads())
            t.accepted[b] = reject(laws + b * T * V, t.proposed + b * (T - 1) * V, t.token + b * T + 1, T - 1, V,
                                   t.temperature, t.seed[b], t.position[b], t.picked + b * T);
        if (t.rejection) run.barrier();
        for (int64_t i = omp_get_thread_num(); i < B * T; i += omp_get_num_threads()) {
            if (t.rejection && i % T > t.accepted[i / T]) continue;
            if (!t.rejection)
                t.picked[i] = pick(laws + i * V, V, t.temperature, t.seed[i / T], t.position[i / T] + depth[i % T]);
            t.logprob[i] = log_probability(scores.data() + i * V, V, t.picked[i]);
        }
        run.barrier();
        if (omp_get_thread_num() == 0) accept(drafter ? t.draft_length : t.length);
        run.barrier();
        compact(layers, trunk + 1);
        if (K && drafter) chain(*drafter);
        if (K && !drafter) branch(layers + trunk + 1, heads - 1);
    }

  private:
    void begin(const Layer& drafter) {
        if (omp_get_thread_num() == 0) {
            std::copy_n(t.state, B * D, z.data());
            for (int64_t b = 0; b < B; ++b) t.path[b] = t.accepted[b] = 0, kept.push(t.token[b], b, t.draft_length[b], 0);
        }
        run.barrier();
        chain(drafter);
    }

    void accept(const int64_t* lengths) {
        for (int64_t b = 0; b < B; ++b) {
            int64_t *picked = t.picked + b * T, *path = t.path + b * T, a = 0;
            path[0] = 0;
            for (int64_t i = 1; i < T; ++i)
                if (t.rejection ? i <= t.accepted[b] : t.parent[i] == path[a] && t.token[b * T + i] == picked[path[a]])
                    path[++a] = i;
            t.accepted[b] = a;
            for (int64_t i = 0; i <= a; ++i) picked[i] = picked[path[i]], t.logprob[b * T + i] = t.logprob[b * T + path[i]];
            for (int64_t i = 0; i < a; ++i) kept.push(picked[i], b, lengths[b], i);
            before += a;
        }
        for (int64_t b = 0; b < B; ++b) kept.push(t.picked[b * T + t.accepted[b]], b, lengths[b], t.accepted[b]);
    }

    // The accepted nodes' keys and values stand behind each other.
    void compact(const Layer* layers, int64_t count) {
        for (Part p(count); p.begin < p.end; ++p.begin) {
            const Layer& l = layers[p.begin];
            for (int64_t b = 0; b < B; ++b)
                for (int64_t i = 1; i <= t.accepted[b]; ++i) {
                    const int64_t from = t.path[b * T + i];
                    for (int64_t g = 0; g < m.kv_heads && from != i; ++g)
                        for (W* side : {(W*)l.keys, (W*)l.values}) {
                            W* row = side + ((b * m.kv_heads + g) * l.capacity + t.length[b]) * m.head_dim;
                            std::copy_n(row + from * m.head_dim, m.head_dim, row + i * m.head_dim);
                        }
                }
        }
    }

    // The trunk's output at the kept items.
    void start() {
        for (Part p(before + B); p.begin < p.end; ++p.begin) {
            const int64_t b = kept.row[p.begin], node = t.path[b * T + kept.slot[p.begin] - kept.base[p.begin]];
            std::copy_n(z.data() + (b * T + node) * D, D, states.data() + p.begin * D);
        }
        run.barrier();
    }

    // A sequential head: its block on the kept items, then on its own drafts.
    void chain(const Layer& layer) {
        start();
        run.block(layer, kept.items(), states.data(), true, before);
        const Part p(B);
        float* state = states.data() + before * D;
        for (int64_t d = 0; d < K; ++d) {
            run.logits(state, B, M, scores.data(), true);
            for (int64_t b = p.begin; b < p.end; ++b) propose(scores.data() + b * M, b, d);
            run.barrier();
            if (d + 1 == K) break;
            Further next;  // each thread's own
            for (int64_t b = 0; b < B; ++b) next.push(t.draft[(b * K + d) * t.ranks], b, kept.slot[before + b] + 1, d);
            run.block(layer, next.items(), state, true);
        }
    }

    // Parallel heads, each on the kept items.
    void branch(const Layer* layers, int64_t heads) {
        const Part p(B);
        for (int64_t h = 0; h < heads; ++h) {
            start();
            run.block(layers[h], kept.items(), states.data(), false, before);
            for (int64_t b = p.begin; b < p.end; ++b)
                std::copy_n(states.data() + (before + b) * D, D, hidden.data() + (b * heads + h) * D);
            run.barrier();
        }
        run.logits(hidden.data(), B * heads, M, scores.data(), true);
        for (int64_t i = omp_get_thread_num(); i < B * heads; i += omp_get_num_threads())
            propose(scores.data() + i * M, i / heads, i % heads);
    }

    // The best candidates for place d, one after the other; the logits of those found are spent.
    void propose(float* logits, int64_t b, int64_t d) {
        const uint64_t seed = uint64_t(t.seed[b]) ^ (t.rejection ? DRAFT : 0);
        if (filters(t)) filter(logits, M, t);
        if (t.rejection) {
            float* law = t.proposal + (b * K + d) * V;
            std::fill(std::copy_n(logits, M, law), law + V, -INFINITY);
        }
        for (int64_t r = 0; r < t.ranks; ++r) {
            const int64_t found = pick(logits, M, t.temperature, seed, t.position[b] + t.accepted[b] + 1 + d);
            t.draft[(b * K + d) * t.ranks + r] = found;
            logits[found] = -INFINITY;
        }
    }
};

template <class W>
void forward(const Model& m, const Layer* layers, int64_t trunk, int64_t heads, bool stacked, const Items& items,
             float* z, float* hidden) {
    const int64_t R = items.count, D = m.width;
    Runner<W> run(m, R);
#pragma omp parallel num_threads(m.threads)
    {
        for (Part p(R); p.begin < p.end; ++p.begin) run.embed(items.token[p.begin], z + p.begin * D);
        run.barrier();
        for (int64_t l = 0; l < trunk; ++l) run.block(layers[l], items, z, false);
        for (int64_t h = 0; h < heads; ++h) {
            const Part p(R * D);
            const float* from = stacked && h ? hidden + (h - 1) * R * D : z;
            std::copy(from + p.begin, from + p.end, hidden + h * R * D + p.begin);
            run.barrier();
            run.block(layers[trunk + h], items, hidden + h * R * D, false);
        }
    }
}

template <class W>
void draft(const Model& m, const Layer& layer, const Items& items, int64_t from, float* x) {
    Runner<W> run(m, items.count);
#pragma omp parallel num_threads(m.threads)
    run.block(layer, items, x, true, from);
}

template <class W>
void logits(const Model& m, const float* states, int64_t rows, int64_t vocabulary, bool drafts, float* out) {
    Runner<W> run(m, rows);
#pragma omp parallel num_threads(m.threads)
    run.logits(states, rows, vocabulary, out, drafts);
}

template <class W>
void turn(const Model& m, const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter, const Turn& t) {
    Turner<W> turner(m, t);
#pragma omp parallel num_threads(m.threads)
    turner.go(layers, trunk, heads, drafter);
}

}  // namespace

extern "C" {

// Outputs of a panel of bfloat16, and of bytes; 0 where there are none.
int64_t foretoken_panel() { return PANEL; }
int64_t foretoken_bytes() { return BYTES; }

// A matrix (outputs, inputs) of bfloat16 that becomes panels.
struct Packing {
    const uint32_t* from;  // pairs of numbers
    uint32_t* to;
    int64_t outputs, inputs;
};
void foretoken_pack(const Packing* all, int64_t count, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
        const Packing& m = all[i];
        const int64_t pairs = m.inputs / 2;
        for (int64_t o = 0; o < m.outputs; ++o) {
            uint32_t* to = m.to + o / LANES * LANES * pairs + o % LANES;
            for (int64_t j = 0; j < pairs; ++j) to[j * LANES] = m.from[o * pairs + j];
        }
    }
}

// The same as panels of bytes: an output is nearly its bytes times its factor.
void foretoken_pack_bytes(const Packing* all, int64_t count, int64_t threads) {
    for (int64_t i = 0; i < count; ++i) {
        const Packing& m = all[i];
        const int64_t n = m.inputs, words = n / 4;
#pragma omp parallel for num_threads(threads)
        for (int64_t o = 0; o < m.outputs; ++o) {
            uint32_t* panel = m.to + o / LANES * (words + 2) * LANES + o % LANES;
            const bf16* row = (const bf16*)m.from + o * n;
            const float most = largest(row, n), inverse = most > 0 ? 127.0f / most : 0.0f, factor = most / 127.0f;
            int32_t total = 0;
            for (int64_t j = 0; j < words; ++j) {
                uint32_t word = 0;
                for (int64_t k = 0; k < 4; ++k) {
                    const int32_t whole = int32_t(std::lrintf(widen(row[4 * j + k]) * inverse));
                    total += whole, word |= uint32_t(uint8_t(whole)) << (8 * k);
                }
                panel[j * LANES] = word;
            }
            std::memcpy(panel + words * LANES, &factor, 4);
            panel[(words + 1) * LANES] = uint32_t(128 * total);
        }
    }
}

// z (R, D): the trunk's output. hidden (heads, R, D): the heads' states. None of them normalised. stacked: a head reads
// the state of the one before it, and the first of them z.
void foretoken_forward(const Model* m, const Layer* layers, int64_t trunk, int64_t heads, int64_t stacked,
                       const Items* items, float* z, float* hidden) {
    (m->bfloat16 ? forward<bf16> : forward<float>)(*m, layers, trunk, heads, stacked, *items, z, hidden);
}

// The block of a sequential head on x (R, D), in place; of items before `from` keys and values are all that is made.
void foretoken_draft(const Model* m, const Layer* layer, const Items* items, int64_t from, float* x) {
    (m->bfloat16 ? draft<bf16> : draft<float>)(*m, *layer, *items, from, x);
}

// Logits (rows, vocabulary) of states (rows, D), of the first tokens; drafts: bytes will do.
void foretoken_logits(const Model* m, const float* states, int64_t rows, int64_t vocabulary, int64_t drafts, float* out) {
    (m->bfloat16 ? logits<bf16> : logits<float>)(*m, states, rows, vocabulary, drafts, out);
}

// A whole step: the forward, the target's tokens, how many drafts they accept, and the next drafts; of the block
// `drafter` if there is one, else of heads 2..heads. The drafter's cache then holds the accepted positions, and keys of
// drafts behind them.
void foretoken_turn(const Model* m, const Layer* layers, int64_t trunk, int64_t heads, const Layer* drafter,
                    const Turn* t) {
    (m->bfloat16 ? turn<bf16> : turn<float>)(*m, layers, trunk, heads, drafter, *t);
}
}
