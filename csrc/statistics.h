#pragma once

#include <cstdint>
#include <type_traits>

// nvcc compiles these for both sides; the attribute keeps the CPU's copies out of the linker's sight.
#ifdef __CUDACC__
#define NORMOPS_HOST_DEVICE __host__ __device__
#else
#define NORMOPS_HOST_DEVICE
#endif

namespace normops {

// Arithmetic is done in float, and in double for double.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Joins the moments (mean and sum of squared deviations) of a set of `count` numbers with those of `added` more:
// Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
// The two ratios depend on the counts alone, so many channels with equal counts share them.
struct MomentsMerge {
  double share;  // weight of the added mean
  double cross;  // weight of the squared distance between the two means

  NORMOPS_HOST_DEVICE MomentsMerge(double count, double added)
      : share(added / (count + added)), cross(count * (added / (count + added))) {}

  NORMOPS_HOST_DEVICE __attribute__((always_inline)) void operator()(double& mean, double& m2, double added_mean,
                                                                     double added_m2) const {
    const double distance = added_mean - mean;
    mean += distance * share;
    m2 += added_m2 + distance * distance * cross;
  }
};

// A mean as the nearest A and the rest. For data of type A, deviations from the nearest are exact or nearly so.
template <typename A>
struct SplitMean {
  A center = 0;
  double low = 0;

  SplitMean() = default;
  NORMOPS_HOST_DEVICE explicit SplitMean(double mean) : center(A(mean)), low(mean - center) {}
};

// The derivative of xhat, with g = dy * weight and means over the elements that share a statistic:
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
// written as dx = rstd * g + slope * (x - center) + shift. RMSNorm has no mean to subtract (centered = false).
template <typename A>
struct InputGradientIn {
  A slope;
  A shift;

  NORMOPS_HOST_DEVICE InputGradientIn(A rstd, A low, A mean_g, A mean_g_xhat, bool centered)
      : slope(-rstd * rstd * mean_g_xhat), shift((centered ? -rstd * mean_g : A(0)) - slope * low) {}
};
using InputGradient = InputGradientIn<double>;

}  // namespace normops
