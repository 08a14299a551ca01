# Options of the build and the flags that every target shares.
option(PDXFER_PYTHON "Build the Python module" ON)
option(PDXFER_TESTS "Build the C++ tests" OFF)
option(PDXFER_WERROR "Treat warnings as errors" OFF)
set(PDXFER_SANITIZE "" CACHE STRING "Sanitizers for -fsanitize=, such as address,undefined or thread")
set(PDXFER_VERSION "${SKBUILD_PROJECT_VERSION}" CACHE STRING "Version compiled into the module")
if(NOT PDXFER_VERSION)
  set(PDXFER_VERSION "0.0.0+dev")
endif()

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

add_library(pdxfer_options INTERFACE)
target_compile_features(pdxfer_options INTERFACE cxx_std_20)
target_compile_options(pdxfer_options INTERFACE -Wall -Wextra -Wpedantic -fvisibility=hidden
  $<$<BOOL:${PDXFER_WERROR}>:-Werror>)
# libstdc++ travels inside the wheel: a module built on a new distribution must load on an old one.
target_link_options(pdxfer_options INTERFACE -Wl,--as-needed)
if(PDXFER_SANITIZE)
  target_compile_options(pdxfer_options INTERFACE -fsanitize=${PDXFER_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(pdxfer_options INTERFACE -fsanitize=${PDXFER_SANITIZE})
endif()
