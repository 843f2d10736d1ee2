// The nonlinearities of ops/_activations.py and their derivatives, by vectors.
#pragma once
#include "adapter.h"
#include "matrix/row_vectors.h"

namespace peft_kernels::PK_ISA {

typedef int32_t IntVec __attribute__((vector_size(V * 4)));
typedef uint32_t UintVec __attribute__((vector_size(V * 4)));

constexpr float LEAKY_SLOPE = 0.01f;
constexpr float SQRT_HALF = 0.70710678118654752f;
constexpr float DENSITY_AT_0 = 0.39894228040143268f;  // 1 / sqrt(2 pi)
constexpr float GELU_A = 0.79788456080286536f, GELU_B = 0.044715f;

// Horner's rule, the highest power first.
template <int N>
PK_INLINE Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec y = splat(coefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < N; i++) y = y * x + coefficients[i];
  return y;
}

PK_INLINE Vec magnitude(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
PK_INLINE Vec with_sign(Vec x, Vec sign) { return (Vec)((IntVec)x | ((IntVec)sign & INT32_MIN)); }

// Within 2 units in the last place; inf and 0 beyond the normal numbers. Cephes' expf.
PK_INLINE Vec exp(Vec x) {
  constexpr float LOW = -87.3f, HIGH = 88.3f, ROUND = 12582912.0f;  // 1.5 * 2^23
  Vec inner = x < LOW ? splat(LOW) : x;
  inner = inner > HIGH ? splat(HIGH) : inner;
  const Vec n = (inner * 1.44269504088896341f + ROUND) - ROUND;
  const Vec rest = (inner - n * 0.693359375f) - n * -2.12194440e-4f;
  constexpr float TERMS[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                             4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  const Vec y = polynomial(rest, TERMS) * rest * rest + rest + 1.0f;
  const Vec power = (Vec)((__builtin_convertvector(n, IntVec) + 127) << 23);
  Vec result = y * power;
  result = x < LOW ? Vec{} : result;
  return x > HIGH ? splat(__builtin_inff()) : result;
}

PK_INLINE Vec sigmoid(Vec z) { return 1.0f / (1.0f + exp(-z)); }

// Cephes' tanhf.
PK_INLINE Vec tanh(Vec z) {
  constexpr float TERMS[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f,
                             1.33314422036e-1f, -3.33332819422e-1f};
  const Vec square = z * z, size = magnitude(z);
  const Vec small = polynomial(square, TERMS) * square * z + z;
  const Vec large = with_sign(1.0f - 2.0f / (exp(2.0f * size) + 1.0f), z);
  return size < 0.625f ? small : large;
}

// The normal distribution function, by the erfc of Numerical Recipes: within 1.2e-7 of it, also far
// below 0 where 1 + erf would cancel.
PK_INLINE Vec normal_cdf(Vec z) {
  constexpr float TERMS[] = {0.17087277f, -0.82215223f, 1.48851587f,  -1.13520398f, 0.27886807f,
                             -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f,  -1.26551223f};
  const Vec x = magnitude(z) * SQRT_HALF;
  const Vec t = 1.0f / (1.0f + 0.5f * x);
  const Vec tail = 0.5f * t * exp(polynomial(t, TERMS) - x * x);
  return z < 0.0f ? tail : 1.0f - tail;
}

PK_INLINE Vec gelu_tanh_sigmoid(Vec z) {  // (1 + tanh(w)) / 2 = sigmoid(2 w)
  return sigmoid((2 * GELU_A) * (z + GELU_B * z * z * z));
}

template <Activation A>
PK_INLINE Vec activation_of(Vec z) {
  if constexpr (A == Activation::relu) return z < 0.0f ? Vec{} : z;  // a NaN stays one
  if constexpr (A == Activation::leaky_relu) return z > 0.0f ? z : z * LEAKY_SLOPE;
  if constexpr (A == Activation::gelu) return z * normal_cdf(z);
  if constexpr (A == Activation::gelu_tanh) return z * gelu_tanh_sigmoid(z);
  if constexpr (A == Activation::silu) return z * sigmoid(z);
  if constexpr (A == Activation::tanh) return tanh(z);
  if constexpr (A == Activation::sigmoid) return sigmoid(z);
  return z;
}

template <Activation A>
PK_INLINE Vec derivative_of(Vec z) {
  const Vec one = splat(1.0f);
  if constexpr (A == Activation::relu) return z > 0.0f ? one : Vec{};
  if constexpr (A == Activation::leaky_relu) return z > 0.0f ? one : splat(LEAKY_SLOPE);
  if constexpr (A == Activation::gelu)
    return normal_cdf(z) + z * (DENSITY_AT_0 * exp(-0.5f * z * z));
  if constexpr (A == Activation::gelu_tanh) {
    const Vec s = gelu_tanh_sigmoid(z);
    return s + z * (2 * GELU_A) * (s * (1.0f - s)) * (1.0f + 3 * GELU_B * z * z);
  }
  if constexpr (A == Activation::silu) {
    const Vec s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
  }
  if constexpr (A == Activation::tanh) {
    const Vec t = tanh(z);
    return 1.0f - t * t;
  }
  if constexpr (A == Activation::sigmoid) {
    const Vec s = sigmoid(z);
    return s * (1.0f - s);
  }
  return one;
}

// Calls f with the activation as a compile-time constant.
template <int A = int(Activation::sigmoid), class F>
PK_INLINE void with_activation(Activation activation, F f) {
  if constexpr (A > 0)
    if (int(activation) < A) return with_activation<A - 1>(activation, f);
  f(std::integral_constant<Activation, Activation(A)>{});
}

// a = act(z)
inline void activate(Activation activation, const float* z, int64_t count, float* a) {
  with_activation(activation, [&](auto A) {
    by_vectors(count, [&](int64_t j, auto lanes) {
      store(a + j, activation_of<A>(load(z + j, lanes)), lanes);
    });
  });
}

// dz = act'(z) da, in da's place
inline void activate_backward(Activation activation, const float* z, int64_t count, float* da) {
  with_activation(activation, [&](auto A) {
    by_vectors(count, [&](int64_t j, auto lanes) {
      store(da + j, derivative_of<A>(load(z + j, lanes)) * load(da + j, lanes), lanes);
    });
  });
}

}  // namespace peft_kernels::PK_ISA
