// Eight rays at a time, nothing kept: look up the tri-planes, decode, composite; the way back does it again and returns gradients.
// The maths is that of generator.sample_planes, Decoder (leaky ReLU), ball_prior and rendering.march; chapter 05 proves that both agree.
// Plain C interface, no library: c++ -O3 -march=native -shared -fPIC and what generator.FLAGS adds.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__SSE__)
#include <immintrin.h>
struct TinyIsZero { // subnormal numbers count as zero until the end of the block: several times as fast, and nobody else's affair
    unsigned before = _mm_getcsr();
    TinyIsZero() { _mm_setcsr(before | 0x8040); }
    ~TinyIsZero() { _mm_setcsr(before); }
};
#define TINY_IS_ZERO TinyIsZero tiny_is_zero;
#else
#define TINY_IS_ZERO
#endif

struct Field { // a scene's constants; the same order as generator.MarchField
  int h, w, axes[6];
  float box, ball, radius, scale;
};

namespace {
constexpr int MAX_SAMPLES = 128, L = 8; // L: rays that are marched side by side
typedef float V __attribute__((vector_size(32))); // one number of each of eight rays, or eight channels of one ray
typedef int I __attribute__((vector_size(32)));
struct __attribute__((packed, aligned(4))) U { V v; };
inline V get(const float* p) { return reinterpret_cast<const U*>(p)->v; }
inline void add(float* p, V v) { reinterpret_cast<U*>(p)->v += v; }
inline V all(float x) { return V{} + x; }
inline V lesser(V a, V b) { return a < b ? a : b; }
inline V greater(V a, V b) { return a > b ? a : b; }

inline V exp_(V x) { // to 2e-7 of its value; exp(-87) stands for all that is smaller
  x = lesser(greater(x, all(-87.f)), all(87.f));
  const V near = x * 1.44269504089f;
  const I n = __builtin_convertvector(near + (near < 0.f ? all(-.5f) : all(.5f)), I); // cut towards zero: the nearest whole number
  const V r = x - __builtin_convertvector(n, V) * .693147180560f;
  const V p = ((((all(1.9875691e-4f) * r + 1.3981999e-3f) * r + 8.3334519e-3f) * r + 4.1665796e-2f) * r + 1.6666665e-1f) * r + .5f;
  return (p * r * r + r + 1.f) * reinterpret_cast<V>((n + 127) << 23); // times two to the n
}
inline V sigmoid(V x) { return 1.f / (1.f + exp_(-x)); }
inline V log1p_(V e) { // of 0 .. 1: twice the area tangent of e / (2 + e), which is at most a third
  const V y = e / (2.f + e), q = y * y;
  return 2 * y * (1.f + q * (1.f / 3 + q * (.2f + q * (1.f / 7 + q * (1.f / 9 + q * (1.f / 11 + q * (1.f / 13 + q * (1.f / 15))))))));
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif
inline void transpose(V* a) { // 8 x 8
#ifdef SHUFFLES
  V b[8];
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) for (int j = 0; j < 2; ++j) {
    a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    const V low = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11), high = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    a[i] = low; a[i + 4] = high;
  }
#else
  for (int i = 0; i < 8; ++i) for (int j = 0; j < i; ++j) { const float x = a[i][j]; a[i][j] = a[j][i]; a[j][i] = x; }
#endif
}

struct Side { I at[2]; V weight[2], slope[2]; }; // two neighbouring pixels of an axis; outside, weight and slope are 0
inline Side side(V x, int size, float box) {
  x = lesser(greater((x * (2 / box) + 1.f) * (size * .5f) - .5f, all(-4.f)), all(size + 4.f)); // far outside is outside
  I low = __builtin_convertvector(x, I);
  low += __builtin_convertvector(low, V) > x; // cut towards zero, then down: true is -1
  const V part = x - __builtin_convertvector(low, V);
  Side s;
  for (int j = 0; j < 2; ++j) {
    const I i = low + j, inside = (i >= 0) & (i < size);
    s.at[j] = inside ? i : I{};
    s.weight[j] = inside ? (j ? part : 1.f - part) : V{};
    s.slope[j] = inside ? all((j ? 1 : -1) * (size / box)) : V{};
  }
  return s;
}

struct Corners { I row[12]; V weight[12], du[12], dv[12]; }; // what one point of each ray reads, 3 planes x 4 rows; weight and its slopes along u and v
template <bool SLOPES>
inline void corners(const Field& f, const V* x, Corners& k) {
  for (int p = 0; p < 3; ++p) {
    const Side u = side(x[f.axes[2 * p]], f.w, f.box), v = side(x[f.axes[2 * p + 1]], f.h, f.box);
    for (int j = 0; j < 4; ++j) {
      const int i = p * 4 + j, a = j & 1, b = j >> 1;
      const V third = v.weight[b] * (1.f / 3);
      k.row[i] = (p * f.h + v.at[b]) * f.w + u.at[a];
      k.weight[i] = u.weight[a] * third;
      if (SLOPES) { k.du[i] = u.slope[a] * third; k.dv[i] = u.weight[a] * v.slope[b] * (1.f / 3); }
    }
  }
}

template <int C, int H, int F> struct Net { // decoder weights in the order in which they are read
  float w1[H][C], w1t[C][H], b1[H], w2[1 + F][H], w2t[H][1 + F], b2[1 + F];
};
template <int C, int H, int F>
void fill(Net<C, H, F>& n, const float* w1, const float* b1, const float* w2, const float* b2) {
  std::memcpy(n.w1, w1, sizeof n.w1); std::memcpy(n.b1, b1, sizeof n.b1); std::memcpy(n.w2, w2, sizeof n.w2); std::memcpy(n.b2, b2, sizeof n.b2);
  for (int j = 0; j < H; ++j) { for (int c = 0; c < C; ++c) n.w1t[c][j] = n.w1[j][c]; for (int q = 0; q <= F; ++q) n.w2t[j][q] = n.w2[q][j]; }
}

template <int C, int H, int F> struct Rays { // what eight rays meet
  V o[3], d[3], t[MAX_SAMPLES], raw[MAX_SAMPLES], value[MAX_SAMPLES][F], tau[MAX_SAMPLES], weight[MAX_SAMPLES], through[MAX_SAMPLES], ends[MAX_SAMPLES];
  V feature[MAX_SAMPLES][C], hidden[MAX_SAMPLES][H], back[MAX_SAMPLES][H]; // back: gradients of what goes into the hidden layer
  void at(int s, V* x) const { for (int a = 0; a < 3; ++a) x[a] = o[a] + d[a] * t[s]; }
};

template <int IN, int OUT>
inline void dense(const V* x, const float (*w)[OUT], V* y) { // y += w^T x, eight outputs at a time in registers
  for (int j = 0; j < OUT; j += 8) {
    V a[8];
    for (int i = 0; i < 8; ++i) a[i] = y[j + i];
    for (int c = 0; c < IN; ++c) { const V q = x[c]; for (int i = 0; i < 8; ++i) a[i] += q * w[c][j + i]; }
    for (int i = 0; i < 8; ++i) y[j + i] = a[i];
  }
}

template <int C, int H, int F>
inline void look(const Field& f, const Net<C, H, F>& n, const float* table, const float* o, const float* d, const float* t, int lanes, int S, Rays<C, H, F>& r) {
  for (int l = 0; l < L; ++l) { // of fewer rays, the last fills up
    const int i = l < lanes ? l : lanes - 1;
    for (int a = 0; a < 3; ++a) { r.o[a][l] = o[i * 3 + a]; r.d[a][l] = d[i * 3 + a]; }
    for (int s = 0; s < S; ++s) r.t[s][l] = t[i * S + s];
  }
  for (int s = 0; s < S; ++s) {
    V x[3]; Corners k; V* y = r.feature[s];
    r.at(s, x); corners<false>(f, x, k);
    for (int l = 0; l < L; ++l) {
      V sum[C / 8] = {};
      for (int i = 0; i < 12; ++i) {
        const float* row = table + std::ptrdiff_t(k.row[i][l]) * C; const float q = k.weight[i][l];
        for (int c = 0; c < C / 8; ++c) sum[c] += q * get(row + 8 * c);
      }
      for (int c = 0; c < C / 8; ++c) y[8 * c + l] = sum[c];
    }
    for (int c = 0; c < C / 8; ++c) transpose(y + 8 * c); // from channels of a ray to rays of a channel
    V* z = r.hidden[s];
    for (int j = 0; j < H; ++j) z[j] = all(n.b1[j]);
    dense<C, H>(y, n.w1t, z);
    V out[1 + F];
    for (int q = 0; q <= F; ++q) out[q] = all(n.b2[q]);
    for (int j = 0; j < H; ++j) {
      z[j] = greater(z[j], .2f * z[j]) * 1.41421356237f;
      for (int q = 0; q <= F; ++q) out[q] += z[j] * n.w2t[j][q];
    }
    if (f.ball != 0) out[0] += greater(f.ball * (1.f - (x[0] * x[0] + x[1] * x[1] + x[2] * x[2]) / (f.radius * f.radius)), all(-2 * f.ball));
    r.raw[s] = out[0];
    for (int q = 0; q < F; ++q) r.value[s][q] = sigmoid(out[1 + q]);
  }
  V sum{};
  for (int i = 0; i < S - 1; ++i) {
    const V m = (r.raw[i] + r.raw[i + 1]) * .5f - 1.f;
    r.tau[i] = f.scale * (greater(m, V{}) + log1p_(exp_(-greater(m, -m)))) * (r.t[i + 1] - r.t[i]);
    r.through[i] = exp_(-sum); r.weight[i] = r.through[i] * (1.f - exp_(-r.tau[i]));
    sum += r.tau[i];
  }
  for (int s = 0; s < S; ++s) r.ends[s] = ((s ? r.weight[s - 1] : V{}) + (s < S - 1 ? r.weight[s] : V{})) * .5f;
}

template <class T> struct Aligned { // for vectors, whatever the allocator does
  std::unique_ptr<char[]> memory{new char[sizeof(T) + 64]};
  T* operator->() { return reinterpret_cast<T*>((reinterpret_cast<std::uintptr_t>(memory.get()) + 63) & ~std::uintptr_t(63)); }
  T& operator*() { return *operator->(); }
};

template <int C, int H, int F>
void forward_(const Field& f, const float* table, const float* o, const float* d, const float* t, const float* w1, const float* b1, const float* w2, const float* b2,
              int N, int S, float* values, float* depth, float* weight) {
  Aligned<Net<C, H, F>> net; Aligned<Rays<C, H, F>> rays; auto& r = *rays;
  fill(*net, w1, b1, w2, b2);
  for (int i = 0; i < N; i += L) {
    const int lanes = N - i < L ? N - i : L;
    look<C, H, F>(f, *net, table, o + i * 3, d + i * 3, t + i * S, lanes, S, r);
    V v[F] = {}, z{}, w{};
    for (int s = 0; s < S; ++s) { z += r.ends[s] * r.t[s]; for (int q = 0; q < F; ++q) v[q] += r.ends[s] * (r.value[s][q] * 1.002f - .001f); }
    for (int s = 0; s < S - 1; ++s) w += r.weight[s];
    for (int l = 0; l < lanes; ++l) { for (int q = 0; q < F; ++q) values[(i + l) * F + q] = v[q][l]; depth[i + l] = z[l]; weight[i + l] = w[l]; }
  }
}

template <int C, int H, int F> struct NetGradient { V w1[H][C], b1[H], w2[1 + F][H], b2[1 + F]; }; // ray by ray, added up at the end

template <int C, int H, int F>
void backward_(const Field& f, const float* table, const float* o, const float* d, const float* t, const float* w1, const float* b1, const float* w2, const float* b2,
               const float* gv, const float* gz, const float* gw, int N, int S, float* gtable, float* gnet, float* go, float* gd) {
  Aligned<Net<C, H, F>> net; Aligned<Rays<C, H, F>> rays; Aligned<NetGradient<C, H, F>> sums; auto& r = *rays; auto& n = *net; auto& m = *sums;
  fill(n, w1, b1, w2, b2);
  if (gnet) std::memset(&m, 0, sizeof m);
  V graw[MAX_SAMPLES], gends[MAX_SAMPLES], gmid[MAX_SAMPLES];
  for (int i = 0; i < N; i += L) {
    const int lanes = N - i < L ? N - i : L;
    look<C, H, F>(f, n, table, o + i * 3, d + i * 3, t + i * S, lanes, S, r);
    V g[F] = {}, gzi{}, gwi{};
    for (int l = 0; l < lanes; ++l) { for (int q = 0; q < F; ++q) g[q][l] = gv[(i + l) * F + q]; gzi[l] = gz[i + l]; gwi[l] = gw[i + l]; }
    for (int s = 0; s < S; ++s) { gends[s] = gzi * r.t[s]; for (int q = 0; q < F; ++q) gends[s] += g[q] * (r.value[s][q] * 1.002f - .001f); }
    V behind{};
    for (int k = S - 2; k >= 0; --k) {
      const V a = (gends[k] + gends[k + 1]) * .5f + gwi;
      gmid[k] = a * (r.through[k] - r.weight[k]) - behind; // d tau
      behind += a * r.weight[k];
      gmid[k] *= (r.t[k + 1] - r.t[k]) * f.scale * .5f * sigmoid((r.raw[k] + r.raw[k + 1]) * .5f - 1.f);
    }
    for (int s = 0; s < S; ++s) graw[s] = (s ? gmid[s - 1] : V{}) + (s < S - 1 ? gmid[s] : V{});
    V goi[3] = {}, gdi[3] = {};
    for (int s = 0; s < S; ++s) {
      V gy[1 + F], gf[C] = {}, x[3], *h = r.back[s]; Corners k;
      gy[0] = graw[s];
      for (int q = 0; q < F; ++q) gy[1 + q] = g[q] * r.ends[s] * 1.002f * r.value[s][q] * (1.f - r.value[s][q]);
      for (int j = 0; j < H; ++j) {
        V a{};
        for (int q = 0; q <= F; ++q) a += gy[q] * n.w2t[j][q];
        h[j] = a * (r.hidden[s][j] > 0.f ? all(1.41421356237f) : all(.282842712475f));
      }
      dense<H, C>(h, n.w1, gf);
      for (int c = 0; c < C / 8; ++c) transpose(gf + 8 * c); // now of ray l: gf[l], gf[8 + l], ...
      r.at(s, x); corners<true>(f, x, k);
      V gx[3][L] = {};
      for (int l = 0; l < L; ++l) for (int p = 0; p < 3; ++p) {
        V u[C / 8] = {}, v[C / 8] = {};
        for (int q = 4 * p; q < 4 * p + 4; ++q) {
          const std::ptrdiff_t at = std::ptrdiff_t(k.row[q][l]) * C; const float weight = k.weight[q][l], du = k.du[q][l], dv = k.dv[q][l];
          for (int c = 0; c < C / 8; ++c) {
            add(gtable + at + 8 * c, weight * gf[8 * c + l]);
            if (go) { const V row = get(table + at + 8 * c); u[c] += du * row; v[c] += dv * row; }
          }
        }
        if (go) for (int c = 0; c < C / 8; ++c) { gx[f.axes[2 * p]][l] += u[c] * gf[8 * c + l]; gx[f.axes[2 * p + 1]][l] += v[c] * gf[8 * c + l]; }
      }
      if (go) for (int a = 0; a < 3; ++a) {
        transpose(gx[a]);
        V sum{};
        for (int c = 0; c < 8; ++c) sum += gx[a][c];
        if (f.ball != 0) sum -= x[0] * x[0] + x[1] * x[1] + x[2] * x[2] < 3 * f.radius * f.radius ? graw[s] * (f.ball * 2 / (f.radius * f.radius)) * x[a] : V{};
        goi[a] += sum; gdi[a] += sum * r.t[s];
      }
      if (gnet) for (int q = 0; q <= F; ++q) { m.b2[q] += gy[q]; for (int j = 0; j < H; ++j) m.w2[q][j] += gy[q] * r.hidden[s][j]; }
    }
    if (gnet) for (int j = 0; j < H; ++j) {
      for (int s = 0; s < S; ++s) m.b1[j] += r.back[s][j];
      for (int c = 0; c < C; c += 8) {
        V a[8] = {};
        for (int s = 0; s < S; ++s) for (int e = 0; e < 8; ++e) a[e] += r.back[s][j] * r.feature[s][c + e];
        for (int e = 0; e < 8; ++e) m.w1[j][c + e] += a[e];
      }
    }
    if (go) for (int l = 0; l < lanes; ++l) for (int a = 0; a < 3; ++a) { go[(i + l) * 3 + a] = goi[a][l]; gd[(i + l) * 3 + a] = gdi[a][l]; }
  }
  if (gnet) for (std::size_t i = 0; i < sizeof m / sizeof(V); ++i) { // in the order w1, b1, w2, b2
    const V v = reinterpret_cast<const V*>(&m)[i];
    gnet[i] = 0; for (int l = 0; l < L; ++l) gnet[i] += v[l];
  }
}
} // namespace
#define SIZES(call) \
  TINY_IS_ZERO \
  if (S < 2 || S > MAX_SAMPLES) return 2; \
  if (C == 16 && H == 32 && F == 3) { call(16, 32, 3); } else if (C == 32 && H == 64 && F == 3) { call(32, 64, 3); } else return 1; \
  return 0;

// N rays of one scene. table (3, h, w, C), o and d (N, 3), t (N, S) rising; values (N, F), depth (N) not divided by weight, weight (N)
extern "C" int march_forward(const Field* f, int C, int H, int F, const float* table, const float* o, const float* d, const float* t,
                             const float* w1, const float* b1, const float* w2, const float* b2, int N, int S, float* values, float* depth, float* weight) {
#define FORWARD(c, h, q) forward_<c, h, q>(*f, table, o, d, t, w1, b1, w2, b2, N, S, values, depth, weight)
  SIZES(FORWARD)
}

// gradients: gtable (3, h, w, C) is added to; gnet (H C + H + (1 + F) H + 1 + F); go and gd (N, 3), or null where rays need none; so gnet
extern "C" int march_backward(const Field* f, int C, int H, int F, const float* table, const float* o, const float* d, const float* t,
                              const float* w1, const float* b1, const float* w2, const float* b2, const float* gv, const float* gz, const float* gw,
                              int N, int S, float* gtable, float* gnet, float* go, float* gd) {
#define BACKWARD(c, h, q) backward_<c, h, q>(*f, table, o, d, t, w1, b1, w2, b2, gv, gz, gw, N, S, gtable, gnet, go, gd)
  SIZES(BACKWARD)
}
