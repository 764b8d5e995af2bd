// The weight of a layer in the order in which a kernel reads it, kept from call to call.
#pragma once
#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>

#include "algorithm_choice.h"
#include "ops/convolution.h"

namespace convlab {

class KeptWeight {
 public:
  // For such an input, as convolution_pack returns it; packed anew if the weight's version or memory, the input's size,
  // the algorithm or the settings have changed. None for weights that others may change unseen (autograd does not count
  // what is done to tensors of inference mode) and where nothing is packed. Not for several threads at once: under the
  // interpreter's lock.
  std::optional<at::Tensor> packed_for(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                                       at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                       std::string_view algorithm) {
    if (weight.is_inference() || !weight.is_cpu() || !input.is_cpu() || weight.dtype() != input.dtype())
      return std::nullopt;
    Key key = key_of(weight, algorithm);
    if (!packed_.has_value() || key_ != key || sizes_ != input.sizes() || strides_ != input.strides()) {
      packed_ = convolution_pack(input, weight, stride, padding, dilation, groups, algorithm);
      key_ = std::move(key);
      sizes_.assign(input.sizes().begin(), input.sizes().end());
      strides_.assign(input.strides().begin(), input.strides().end());
    }
    return packed_;
  }
  // The same where sizes may change from call to call: packed anew for another size when it comes twice in a row. Until
  // then it is as it was last packed, which kernels that read another order pass over.
  std::optional<at::Tensor> packed_for_some(const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
                                            at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                            std::string_view algorithm) {
    const bool again = seen_ == input.sizes();
    seen_.assign(input.sizes().begin(), input.sizes().end());
    std::optional<at::Tensor> current = again || !input.is_cpu() ? std::nullopt : if_current(weight, algorithm);
    if (current.has_value() && weight.dtype() == input.dtype()) return current;
    return packed_for(input, weight, stride, padding, dilation, groups, algorithm);
  }
  // As it was last packed, for inputs of whatever size; none if the weight, the algorithm or the settings changed.
  std::optional<at::Tensor> if_current(const at::Tensor& weight, std::string_view algorithm) const {
    const bool current = packed_.has_value() && !weight.is_inference() && key_ == key_of(weight, algorithm);
    return current ? packed_ : std::nullopt;
  }
  const std::optional<at::Tensor>& packed() const { return packed_; }

 private:
  struct Key {
    c10::Storage memory;  // held, so that no other weight is found at its address
    const void* data = nullptr;
    int64_t version = 0;
    at::ScalarType dtype = at::kFloat;
    Settings settings;
    std::string algorithm;
    at::DimVector sizes, strides;  // a view may begin at the same address

    bool operator==(const Key& other) const {
      return data == other.data && version == other.version && dtype == other.dtype && settings == other.settings &&
             algorithm == other.algorithm && sizes == other.sizes && strides == other.strides;
    }
  };
  static Key key_of(const at::Tensor& weight, std::string_view algorithm) {
    return {weight.storage(),
            weight.const_data_ptr(),
            weight._version(),
            weight.scalar_type(),
            settings(),
            std::string(algorithm),
            at::DimVector(weight.sizes()),
            at::DimVector(weight.strides())};
  }

  Key key_;
  at::DimVector sizes_, strides_;  // of the input
  at::DimVector seen_;             // the last one's
  std::optional<at::Tensor> packed_;
};

}  // namespace convlab
