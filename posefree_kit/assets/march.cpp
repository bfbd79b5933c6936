// One ray at a time, nothing kept: look up the tri-planes, decode, composite; the way back does it again and returns gradients.
// The maths is that of generator.sample_planes, Decoder (leaky ReLU), ball_prior and rendering.march; chapter 05 proves that both agree.
// Plain C interface, no library: c++ -O3 -march=native -ffast-math -shared -fPIC.
#include <cmath>
#include <cstddef>
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
constexpr int MAX_SAMPLES = 128;
typedef float V __attribute__((vector_size(32))); // eight numbers at once
struct __attribute__((packed, aligned(4))) U { V v; };
inline V get(const float* p) { return reinterpret_cast<const U*>(p)->v; }
inline void put(float* p, V v) { reinterpret_cast<U*>(p)->v = v; }
inline void axpy(float* y, float a, const float* x) { put(y, get(y) + a * get(x)); }
inline float sum(V v) { float a = 0; for (int i = 0; i < 8; ++i) a += v[i]; return a; }

inline float sigmoid(float x) { return 1 / (1 + std::exp(std::fmin(-x, 80.f))); } // -ffast-math knows no infinity

template <int C> struct Corners { // what one point reads: 3 planes x 4 rows
  int row[12]; float weight[12], du[12], dv[12]; // weight and its slopes along u and v, in pixels
};

template <int C>
inline void corners(const Field& f, const float* x, Corners<C>& k) {
  for (int p = 0; p < 3; ++p) {
    float u = (x[f.axes[2 * p]] * (2 / f.box) + 1) * (f.w * .5f) - .5f, v = (x[f.axes[2 * p + 1]] * (2 / f.box) + 1) * (f.h * .5f) - .5f;
    u = std::fmin(std::fmax(u, -4.f), f.w + 4.f); v = std::fmin(std::fmax(v, -4.f), f.h + 4.f); // far outside is outside
    const float u0 = std::floor(u), v0 = std::floor(v), fu = u - u0, fv = v - v0;
    for (int j = 0; j < 4; ++j) {
      const int du = j & 1, dv = j >> 1, xi = int(u0) + du, yi = int(v0) + dv, i = p * 4 + j;
      const bool in = xi >= 0 && xi < f.w && yi >= 0 && yi < f.h;
      const float wu = du ? fu : 1 - fu, wv = dv ? fv : 1 - fv, third = in ? 1.f / 3 : 0.f;
      k.row[i] = in ? (p * f.h + yi) * f.w + xi : 0;
      k.weight[i] = wu * wv * third;
      k.du[i] = (du ? wv : -wv) * third; k.dv[i] = (dv ? wu : -wu) * third;
    }
  }
}

template <int C, int H, int F> struct Net { // decoder weights in both orders
  float w1[H][C], w1t[C][H], b1[H], w2[1 + F][H], b2[1 + F];
};

template <int C, int H, int F> struct Ray { // what one ray meets
  float x[MAX_SAMPLES][3], feature[MAX_SAMPLES][C], hidden[MAX_SAMPLES][H], raw[MAX_SAMPLES], value[MAX_SAMPLES][F];
  float tau[MAX_SAMPLES], weight[MAX_SAMPLES], through[MAX_SAMPLES], ends[MAX_SAMPLES];
  Corners<C> k[MAX_SAMPLES];
};

template <int C, int H, int F>
inline void look(const Field& f, const Net<C, H, F>& n, const float* table, const float* o, const float* d, const float* t, int S, Ray<C, H, F>& r) {
  for (int s = 0; s < S; ++s) {
    for (int a = 0; a < 3; ++a) r.x[s][a] = o[a] + d[a] * t[s];
    corners<C>(f, r.x[s], r.k[s]);
    V y[C / 8] = {};
    for (int i = 0; i < 12; ++i) {
      const float* row = table + std::size_t(r.k[s].row[i]) * C; const float q = r.k[s].weight[i];
      for (int c = 0; c < C / 8; ++c) y[c] += q * get(row + 8 * c);
    }
    std::memcpy(r.feature[s], y, sizeof y);
    V z[H / 8]; std::memcpy(z, n.b1, sizeof z);
    for (int c = 0; c < C; ++c) { const float q = r.feature[s][c]; for (int j = 0; j < H / 8; ++j) z[j] += q * get(n.w1t[c] + 8 * j); }
    for (int j = 0; j < H / 8; ++j) z[j] = (z[j] > 0.f ? z[j] : .2f * z[j]) * 1.41421356237f;
    std::memcpy(r.hidden[s], z, sizeof z);
    float out[1 + F];
    for (int q = 0; q <= F; ++q) { V a = {}; for (int j = 0; j < H / 8; ++j) a += z[j] * get(n.w2[q] + 8 * j); out[q] = sum(a) + n.b2[q]; }
    if (f.ball != 0) {
      const float* x = r.x[s];
      out[0] += std::fmax(f.ball * (1 - (x[0] * x[0] + x[1] * x[1] + x[2] * x[2]) / (f.radius * f.radius)), -2 * f.ball);
    }
    r.raw[s] = out[0];
    for (int q = 0; q < F; ++q) r.value[s][q] = out[1 + q];
  }
  for (int i = 0; i < S * F; ++i) { float& v = (&r.value[0][0])[i]; v = sigmoid(v); }
  for (int i = 0; i < S - 1; ++i) {
    const float m = (r.raw[i] + r.raw[i + 1]) * .5f - 1;
    r.tau[i] = f.scale * (std::fmax(m, 0.f) + std::log1p(std::exp(-std::fabs(m)))) * (t[i + 1] - t[i]);
  }
  float sum = 0;
  for (int i = 0; i < S - 1; ++i) { r.through[i] = sum; sum += r.tau[i]; }
  for (int i = 0; i < S - 1; ++i) { r.through[i] = std::exp(-r.through[i]); r.weight[i] = r.through[i] * (1 - std::exp(-r.tau[i])); }
  for (int s = 0; s < S; ++s) r.ends[s] = ((s ? r.weight[s - 1] : 0) + (s < S - 1 ? r.weight[s] : 0)) * .5f;
}

template <int C, int H, int F>
void fill(Net<C, H, F>& n, const float* w1, const float* b1, const float* w2, const float* b2) {
  std::memcpy(n.w1, w1, sizeof n.w1); std::memcpy(n.b1, b1, sizeof n.b1); std::memcpy(n.w2, w2, sizeof n.w2); std::memcpy(n.b2, b2, sizeof n.b2);
  for (int c = 0; c < C; ++c) for (int j = 0; j < H; ++j) n.w1t[c][j] = n.w1[j][c];
}

template <int C, int H, int F> struct Work { Net<C, H, F> net; Ray<C, H, F> ray; };

template <int C, int H, int F>
void forward_(const Field& f, const float* table, const float* o, const float* d, const float* t, const float* w1, const float* b1, const float* w2, const float* b2,
              int N, int S, float* values, float* depth, float* weight) {
  auto work = std::make_unique<Work<C, H, F>>(); auto& r = work->ray;
  fill(work->net, w1, b1, w2, b2);
  for (int i = 0; i < N; ++i) {
    const float* tt = t + i * S;
    look<C, H, F>(f, work->net, table, o + i * 3, d + i * 3, tt, S, r);
    float v[F] = {0}, z = 0, w = 0;
    for (int s = 0; s < S; ++s) { z += r.ends[s] * tt[s]; for (int q = 0; q < F; ++q) v[q] += r.ends[s] * (r.value[s][q] * 1.002f - .001f); }
    for (int s = 0; s < S - 1; ++s) w += r.weight[s];
    std::memcpy(values + i * F, v, sizeof v);
    depth[i] = z; weight[i] = w;
  }
}

template <int C, int H, int F>
void backward_(const Field& f, const float* table, const float* o, const float* d, const float* t, const float* w1, const float* b1, const float* w2, const float* b2,
               const float* gv, const float* gz, const float* gw, int N, int S, float* gtable, float* gnet, float* go, float* gd) {
  auto work = std::make_unique<Work<C, H, F>>(); auto& r = work->ray; auto& n = work->net;
  fill(n, w1, b1, w2, b2);
  float graw[MAX_SAMPLES], gends[MAX_SAMPLES], gmid[MAX_SAMPLES];
  float gw1[H][C] = {{0}}, gb1[H] = {0}, gw2[1 + F][H] = {{0}}, gb2[1 + F] = {0};
  for (int i = 0; i < N; ++i) {
    const float* tt = t + i * S; const float* g = gv + i * F;
    const float gzi = gz[i], gwi = gw[i];
    look<C, H, F>(f, n, table, o + i * 3, d + i * 3, tt, S, r);
    for (int s = 0; s < S; ++s) { float a = gzi * tt[s]; for (int q = 0; q < F; ++q) a += g[q] * (r.value[s][q] * 1.002f - .001f); gends[s] = a; }
    float behind = 0;
    for (int k = S - 2; k >= 0; --k) {
      const float a = (gends[k] + gends[k + 1]) * .5f + gwi;
      gmid[k] = a * (r.through[k] - r.weight[k]) - behind; // d tau
      behind += a * r.weight[k];
    }
    for (int k = 0; k < S - 1; ++k) {
      const float m = (r.raw[k] + r.raw[k + 1]) * .5f - 1;
      gmid[k] *= (tt[k + 1] - tt[k]) * f.scale * sigmoid(m) * .5f;
    }
    for (int s = 0; s < S; ++s) graw[s] = (s ? gmid[s - 1] : 0) + (s < S - 1 ? gmid[s] : 0);
    float goi[3] = {0}, gdi[3] = {0};
    for (int s = 0; s < S; ++s) {
      float gy[1 + F]; gy[0] = graw[s];
      for (int q = 0; q < F; ++q) gy[1 + q] = g[q] * r.ends[s] * 1.002f * r.value[s][q] * (1 - r.value[s][q]);
      V gh[H / 8] = {}, gf[C / 8] = {};
      const float* z = r.hidden[s]; const float* y = r.feature[s];
      for (int q = 0; q <= F; ++q) {
        gb2[q] += gy[q];
        for (int j = 0; j < H / 8; ++j) { gh[j] += gy[q] * get(n.w2[q] + 8 * j); axpy(gw2[q] + 8 * j, gy[q], z + 8 * j); }
      }
      float h[H];
      for (int j = 0; j < H / 8; ++j) {
        const V slope = get(z + 8 * j) > 0.f ? V{} + 1.41421356237f : V{} + .282842712475f;
        gh[j] *= slope; put(h + 8 * j, gh[j]); put(gb1 + 8 * j, get(gb1 + 8 * j) + gh[j]);
      }
      for (int j = 0; j < H; ++j) { const float q = h[j]; for (int c = 0; c < C / 8; ++c) { gf[c] += q * get(n.w1[j] + 8 * c); axpy(gw1[j] + 8 * c, q, y + 8 * c); } }
      const auto& k = r.k[s];
      for (int p = 0; p < 12; ++p) {
        float* row = gtable + std::size_t(k.row[p]) * C; const float q = k.weight[p];
        for (int c = 0; c < C / 8; ++c) put(row + 8 * c, get(row + 8 * c) + q * gf[c]);
      }
      if (go) {
        float gx[3] = {0};
        for (int p = 0; p < 12; ++p) {
          const float* row = table + std::size_t(k.row[p]) * C; V m = {};
          for (int c = 0; c < C / 8; ++c) m += get(row + 8 * c) * gf[c];
          const float a = sum(m);
          gx[f.axes[p / 4 * 2]] += a * k.du[p] * f.w / f.box; gx[f.axes[p / 4 * 2 + 1]] += a * k.dv[p] * f.h / f.box;
        }
        const float* x = r.x[s];
        if (f.ball != 0 && x[0] * x[0] + x[1] * x[1] + x[2] * x[2] < 3 * f.radius * f.radius)
          for (int a = 0; a < 3; ++a) gx[a] -= graw[s] * f.ball * 2 * x[a] / (f.radius * f.radius);
        for (int a = 0; a < 3; ++a) { goi[a] += gx[a]; gdi[a] += gx[a] * tt[s]; }
      }
    }
    if (go) { std::memcpy(go + i * 3, goi, sizeof goi); std::memcpy(gd + i * 3, gdi, sizeof gdi); }
  }
  float* out = gnet;
  std::memcpy(out, gw1, sizeof gw1); out += H * C; std::memcpy(out, gb1, sizeof gb1); out += H;
  std::memcpy(out, gw2, sizeof gw2); out += (1 + F) * H; std::memcpy(out, gb2, sizeof gb2);
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

// gradients: gtable (3, h, w, C) is added to; gnet (H C + H + (1 + F) H + 1 + F); go and gd (N, 3), or null where rays need none
extern "C" int march_backward(const Field* f, int C, int H, int F, const float* table, const float* o, const float* d, const float* t,
                              const float* w1, const float* b1, const float* w2, const float* b2, const float* gv, const float* gz, const float* gw,
                              int N, int S, float* gtable, float* gnet, float* go, float* gd) {
#define BACKWARD(c, h, q) backward_<c, h, q>(*f, table, o, d, t, w1, b1, w2, b2, gv, gz, gw, N, S, gtable, gnet, go, gd)
  SIZES(BACKWARD)
}
