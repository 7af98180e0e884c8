// The documents of the API as JSON Schema (2020-12, as OpenAPI 3.1 takes them). Internal to api/v1.
#pragma once

#include <string_view>

namespace bulkhead::api::v1 {

inline constexpr std::string_view schemas_text = R"json({
"Problem": {
  "type": "object", "description": "RFC 9457: why a request was not done, and what would help.",
  "required": ["type", "title", "status", "code", "detail"],
  "properties": {
    "type": {"type": "string", "description": "https://bulkhead.dev/problems/<code>"},
    "title": {"type": "string"},
    "status": {"type": "integer", "minimum": 400, "maximum": 599},
    "code": {"type": "string", "enum": ["invalid", "unauthorized", "forbidden", "not-found", "method", "conflict", "stale",
      "quota", "no-room", "too-large", "too-many", "unavailable", "internal"]},
    "detail": {"type": "string", "description": "One sentence."},
    "reasons": {"type": "array", "items": {"type": "string"}},
    "ways": {"type": "array", "items": {"type": "string"}, "description": "The nearest ways to yes."},
    "hint": {"type": "string", "description": "What to type or send next."}}},
"Whoami": {
  "type": "object", "required": ["user", "role"],
  "properties": {"user": {"type": "string"}, "role": {"$ref": "#/components/schemas/Role"}, "tenant": {"type": "string"}, "from": {"type": "string"}}},
"Role": {"type": "string", "enum": ["admin", "operator", "tenant", "auditor"]},
"Name": {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", "description": "Fits a DNS label."},
"Quota": {
  "type": "object", "additionalProperties": false, "description": "At most this much at a time; a key that is absent is no limit.",
  "properties": {
    "leases": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "At once, waiting ones included."},
    "gpus": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "Whole ones: exclusive and passthrough."},
    "slices": {"type": "integer", "minimum": 0, "maximum": 1000000, "description": "MIG instances of any profile."},
    "profiles": {"type": "object", "maxProperties": 64, "propertyNames": {"minLength": 1, "maxLength": 32},
      "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 1000000}, "description": "MIG instances by profile."},
    "shares": {"type": "integer", "minimum": 0, "maximum": 1000000},
    "memory": {"type": "integer", "minimum": 0, "maximum": 1152921504606846976, "description": "Bytes of GPU memory."},
    "watts": {"type": "integer", "minimum": 0, "maximum": 1000000000},
    "gpuSecondsMonth": {"type": "integer", "minimum": 0, "maximum": 1000000000000, "description": "Of a calendar month, UTC; a slice counts its part of the GPU."}}},
"TenantRequest": {
  "type": "object", "additionalProperties": false, "required": ["name"],
  "properties": {
    "name": {"$ref": "#/components/schemas/Name"},
    "weight": {"type": "integer", "minimum": 1, "maximum": 1000000, "default": 100},
    "quota": {"$ref": "#/components/schemas/Quota"},
    "suspended": {"type": "boolean", "default": false, "description": "Keeps what it has, gets nothing new."},
    "note": {"type": "string", "maxLength": 200}}},
"Tenant": {
  "type": "object", "required": ["name", "weight", "quota", "suspended", "created", "version", "held"],
  "properties": {
    "name": {"$ref": "#/components/schemas/Name"}, "weight": {"type": "integer"}, "quota": {"$ref": "#/components/schemas/Quota"},
    "suspended": {"type": "boolean"}, "note": {"type": "string"}, "created": {"type": "string", "format": "date-time"},
    "version": {"type": "integer"}, "held": {"$ref": "#/components/schemas/Held"}}},
"Held": {
  "type": "object", "description": "What the tenant holds now, in the units of its quota.",
  "required": ["leases", "gpus", "slices", "shares", "memory", "watts", "gpuSecondsMonth"],
  "properties": {"leases": {"type": "integer"}, "gpus": {"type": "integer"}, "slices": {"type": "integer"},
    "profiles": {"type": "object", "additionalProperties": {"type": "integer"}}, "shares": {"type": "integer"},
    "memory": {"type": "integer"}, "watts": {"type": "integer"}, "gpuSecondsMonth": {"type": "integer"}}},
"TokenRequest": {
  "type": "object", "additionalProperties": false, "required": ["user", "role"],
  "properties": {
    "user": {"type": "string", "minLength": 1, "maxLength": 100}, "role": {"$ref": "#/components/schemas/Role"},
    "tenant": {"$ref": "#/components/schemas/Name"},
    "ttlSeconds": {"type": "integer", "minimum": 60, "maximum": 315360000},
    "certificate": {"type": "string", "pattern": "^[0-9a-f]{64}$", "description": "SHA-256 of a client certificate; no secret is made."},
    "note": {"type": "string", "maxLength": 200}}},
"Token": {
  "type": "object", "required": ["id", "user", "role", "created"],
  "properties": {
    "id": {"type": "string"}, "user": {"type": "string"}, "role": {"$ref": "#/components/schemas/Role"}, "tenant": {"type": "string"},
    "note": {"type": "string"}, "created": {"type": "string", "format": "date-time"}, "expires": {"type": "string", "format": "date-time"},
    "revoked": {"type": "string", "format": "date-time"}, "certificate": {"type": "boolean"},
    "secret": {"type": "string", "description": "In the answer to its creation alone; never again."}}},
"LeaseRequest": {
  "type": "object", "additionalProperties": false, "required": ["class"],
  "properties": {
    "tenant": {"$ref": "#/components/schemas/Name"},
    "class": {"type": "string", "enum": ["mig", "share", "exclusive", "passthrough"]},
    "profile": {"type": "string", "maxLength": 32, "description": "Of class mig: 1g.10gb."},
    "memory": {"type": "integer", "minimum": 67108864, "maximum": 1125899906842624, "description": "Of class share: the cap in bytes, 64 MiB at least."},
    "weight": {"type": "integer", "minimum": 1, "maximum": 1000, "description": "Of class share: thousandths of a GPU's time."},
    "count": {"type": "integer", "minimum": 1, "maximum": 64, "default": 1, "description": "All or none."},
    "topology": {"type": "string", "enum": ["any", "same-gpu", "same-numa", "same-node", "spread"], "default": "any"},
    "ttlSeconds": {"type": "integer", "minimum": 10, "maximum": 7776000, "default": 3600},
    "deadline": {"type": "string", "format": "date-time", "description": "Not granted by then: it fails."},
    "wait": {"type": "boolean", "default": false, "description": "Queue it when there is no room now."},
    "priority": {"type": "integer", "minimum": -100, "maximum": 100, "default": 0},
    "preemptible": {"type": "boolean", "default": false},
    "models": {"type": "array", "maxItems": 16, "items": {"type": "string", "maxLength": 100}},
    "label": {"type": "string", "maxLength": 100}}},
"Device": {
  "type": "object", "required": ["gpu", "gpuName", "device"],
  "properties": {
    "gpu": {"type": "string"}, "gpuName": {"type": "string"}, "pci": {"type": "string"},
    "device": {"type": "string", "description": "What CUDA_VISIBLE_DEVICES takes; empty until the lease is active."},
    "profile": {"type": "string"}, "start": {"type": "integer"}, "generation": {"type": "integer"}, "memory": {"type": "integer"},
    "weight": {"type": "integer"}, "numaNode": {"type": "integer"}, "cpus": {"type": "string"},
    "deviceNodes": {"type": "array", "items": {"type": "string"}}, "cdi": {"type": "string"}}},
"Lease": {
  "type": "object", "required": ["id", "tenant", "user", "class", "count", "state", "created", "devices", "environment", "guarantees", "version"],
  "properties": {
    "id": {"type": "integer"}, "tenant": {"type": "string"}, "user": {"type": "string"},
    "class": {"type": "string", "enum": ["mig", "share", "exclusive", "passthrough"]}, "profile": {"type": "string"},
    "memory": {"type": "integer"}, "weight": {"type": "integer"}, "count": {"type": "integer"}, "topology": {"type": "string"},
    "ttlSeconds": {"type": "integer"}, "deadline": {"type": "string", "format": "date-time"}, "wait": {"type": "boolean"},
    "priority": {"type": "integer"}, "preemptible": {"type": "boolean"}, "models": {"type": "array", "items": {"type": "string"}},
    "label": {"type": "string"},
    "state": {"type": "string", "enum": ["requested", "queued", "preparing", "active", "releasing", "ended", "failed"]},
    "reason": {"type": "string"}, "ways": {"type": "array", "items": {"type": "string"}},
    "created": {"type": "string", "format": "date-time"}, "activeSince": {"type": "string", "format": "date-time"},
    "expires": {"type": "string", "format": "date-time"}, "ended": {"type": "string", "format": "date-time"},
    "notice": {"type": "string", "format": "date-time", "description": "Will be ended then for one of higher priority."},
    "devices": {"type": "array", "items": {"$ref": "#/components/schemas/Device"}},
    "environment": {"type": "object", "additionalProperties": {"type": "string"}},
    "guarantees": {"type": "array", "items": {"type": "string"}, "description": "What the class promises, in words, and what it does not isolate."},
    "version": {"type": "integer"}}},
"LeasePlace": {
  "type": "object", "required": ["lease", "state"], "description": "What follows the state is there while it is queued.",
  "properties": {"lease": {"type": "integer"}, "state": {"type": "string"},
    "place": {"type": "integer", "description": "Among its own tenant's that wait; 1 is the first. 1001: that or later."},
    "own": {"type": "integer", "description": "Of its own tenant's that wait."},
    "tenantsAhead": {"type": "integer", "description": "Other tenants that go before it, by what they hold and held for their weight."},
    "waiting": {"type": "integer", "description": "Leases that wait in all."}, "why": {"type": "string"}}},
"RenewRequest": {
  "type": "object", "additionalProperties": false, "required": ["ttlSeconds"],
  "properties": {"ttlSeconds": {"type": "integer", "minimum": 10, "maximum": 7776000, "description": "From now; never shortens."}}},
"Gpu": {
  "type": "object", "required": ["gpu", "index", "name", "pool", "free", "leases"],
  "properties": {"gpu": {"type": "string"}, "index": {"type": "integer"}, "name": {"type": "string"}, "pool": {"type": "string"},
    "why": {"type": "string"}, "numaNode": {"type": "integer"}, "free": {"type": "number"}, "leases": {"type": "array", "items": {"type": "integer"}},
    "cordon": {"type": "object", "required": ["why", "by", "since"], "description": "It gets no new leases, by somebody's word.",
      "properties": {"why": {"type": "string"}, "by": {"type": "string"}, "since": {"type": "string", "format": "date-time"}}}}},
"ReasonRequest": {
  "type": "object", "additionalProperties": false, "required": ["why"],
  "properties": {"why": {"type": "string", "minLength": 1, "maxLength": 500, "description": "One line for those whom it touches."}}},
"Host": {
  "type": "object", "required": ["draining", "gpus"],
  "properties": {"draining": {"type": "boolean"}, "trouble": {"type": "string"}, "gpus": {"type": "array", "items": {"$ref": "#/components/schemas/Gpu"}}}},
"DrainRequest": {
  "type": "object", "additionalProperties": false, "required": ["draining"],
  "properties": {"draining": {"type": "boolean", "description": "Nothing new is granted; what is held stays."}}},
"Alarm": {
  "type": "object", "required": ["id", "kind", "severity", "subject", "what", "since", "predicted", "measure", "evidence"],
  "properties": {"id": {"type": "string"}, "kind": {"type": "string"}, "severity": {"type": "string", "enum": ["notice", "warning", "critical"]},
    "subject": {"type": "string"}, "gpu": {"type": ["string", "null"]}, "what": {"type": "string"},
    "since": {"type": "string", "format": "date-time"}, "closed": {"type": ["string", "null"], "format": "date-time"},
    "predicted": {"type": "boolean", "description": "It has not happened yet."},
    "measure": {"type": "object", "required": ["what", "unit", "now", "worst", "opens", "closes"],
      "properties": {"what": {"type": "string"}, "unit": {"type": "string"}, "now": {"type": "number"}, "worst": {"type": "number"},
        "opens": {"type": "number"}, "closes": {"type": "number"}}},
    "evidence": {"type": "array", "items": {"type": "string"}},
    "leases": {"type": "array", "items": {"type": "integer"}}, "tenants": {"type": "array", "items": {"type": "string"}}}},
"Incidents": {
  "type": "object", "required": ["items", "notes", "kernel", "driver"],
  "properties": {
    "items": {"type": "array", "items": {"type": "object", "required": ["id", "title", "cause", "severity", "open", "blast", "blame", "charged"],
      "properties": {"id": {"type": "string"}, "title": {"type": "string"}, "cause": {"type": "string"}, "severity": {"type": "string"},
        "open": {"type": "boolean"}, "blast": {"type": "string", "enum": ["nothing", "process", "slice", "gpu", "partition", "node"]},
        "blame": {"type": "string", "enum": ["nobody", "application", "hardware", "innocent", "unknown"]},
        "charged": {"type": "string", "description": "Who is to answer for it; empty: nobody is."},
        "closedWhy": {"type": "string"}}}},
    "notes": {"type": "array", "items": {"type": "string"}},
    "kernel": {"type": "boolean", "description": "Whether the kernel's log is followed."},
    "driver": {"type": "boolean", "description": "Whether the driver's events are."},
    "next": {"type": "string", "description": "There are more: ask with `after`."},
    "kernelEvents": {"type": "integer"}, "driverEvents": {"type": "integer"}, "kernelRecordsLost": {"type": "integer"}}},
"Healing": {
  "type": "object", "required": ["mode", "open", "acts"],
  "properties": {"mode": {"type": "string", "enum": ["off", "observe", "suggest", "act"]}, "trouble": {"type": "string"},
    "mostAnHour": {"type": "integer"}, "keepHealthy": {"type": "integer"}, "relapseHours": {"type": "integer"},
    "open": {"type": "array", "description": "By incident: the act, whom it costs what, and what holds it back.", "items": {"type": "object",
      "required": ["incident", "act", "now", "why", "held", "steps", "victims", "commands"],
      "properties": {"incident": {"type": "string"}, "index": {"type": ["integer", "null"]}, "act": {"type": "string"}, "now": {"type": "boolean"},
        "why": {"type": "string"}, "held": {"type": "array", "items": {"type": "string"}}, "steps": {"type": "array", "items": {"type": "string"}},
        "victims": {"type": "array", "items": {"type": "object"}}, "disturbed": {"type": "array", "items": {"type": "string"}},
        "commands": {"type": "array", "items": {"type": "string"}}, "next": {"type": "string"}}}},
    "acts": {"type": "array", "description": "Newest first.", "items": {"type": "object", "required": ["id", "incident", "act", "gpu", "doing", "said"],
      "properties": {"id": {"type": "integer"}, "incident": {"type": "string"}, "cause": {"type": "string"}, "act": {"type": "string"},
        "gpu": {"type": "string"}, "index": {"type": "integer"}, "gpuInstance": {"type": ["integer", "null"]},
        "doing": {"type": "string", "enum": ["under-way", "helped", "failed", "quarantined"]}, "step": {"type": "string"},
        "began": {"type": ["string", "null"], "format": "date-time"}, "ended": {"type": ["string", "null"], "format": "date-time"},
        "leases": {"type": "array", "items": {"type": "integer"}}, "said": {"type": "array", "items": {"type": "string"}}}}}}},
"Alarms": {
  "type": "object", "required": ["mode", "open", "recent", "measures"],
  "properties": {"mode": {"type": "string", "enum": ["off", "observe", "act"]}, "trouble": {"type": "string"},
    "open": {"type": "array", "items": {"$ref": "#/components/schemas/Alarm"}},
    "recent": {"type": "array", "items": {"$ref": "#/components/schemas/Alarm"}, "description": "Closed, newest first."},
    "measures": {"type": "array", "description": "What is, or would be, done to GPUs; not for tenants.", "items": {"type": "object",
      "required": ["gpu", "index", "rung", "what", "doing", "why"],
      "properties": {"gpu": {"type": "string"}, "index": {"type": "integer"}, "rung": {"type": "integer"}, "what": {"type": "string"},
        "doing": {"type": "string", "enum": ["nothing", "would", "under-way", "done", "failed"]}, "words": {"type": "string"},
        "why": {"type": "string"}, "alarms": {"type": "array", "items": {"type": "string"}}, "bounded": {"type": "boolean"},
        "powerLimitWatts": {"type": ["number", "null"]}, "powerLimitBeforeWatts": {"type": ["number", "null"]},
        "clocksMhz": {"type": ["integer", "null"]}}}}}},
"Event": {
  "type": "object", "required": ["id", "at", "kind", "what", "verb"],
  "properties": {"id": {"type": "integer"}, "at": {"type": "string", "format": "date-time"}, "kind": {"type": "string"},
    "tenant": {"type": "string"}, "what": {"type": "string"}, "verb": {"type": "string"}, "lease": {"$ref": "#/components/schemas/Lease"}}},
"Values": {
  "type": "object", "description": "By signal: power, temperature, sm. What never came says why under `unavailable`.",
  "additionalProperties": {"type": "object", "required": ["unit"], "properties": {"value": {"type": "number"}, "unit": {"type": "string"},
    "ageMs": {"type": "number", "description": "Since it was true."}, "unavailable": {"type": "string"}}}},
"Telemetry": {
  "type": "object", "required": ["at", "gpus"],
  "properties": {"at": {"type": "string", "format": "date-time"}, "why": {"type": "string", "description": "Why nothing is sampled now."},
    "gpus": {"type": "array", "items": {"type": "object", "required": ["gpu", "index", "name", "state", "slices"],
      "properties": {"gpu": {"type": "string"}, "index": {"type": "integer"}, "name": {"type": "string"}, "pci": {"type": "string"},
        "state": {"type": "string", "enum": ["starting", "sampling", "hung", "lost", "resting"]},
        "call": {"type": "string", "description": "Hung: in this driver function."}, "hungMs": {"type": "number"}, "why": {"type": "string"},
        "tenant": {"type": "string"}, "lease": {"type": "integer"},
        "values": {"$ref": "#/components/schemas/Values", "description": "Of the whole GPU: for who has all of it, and for operators."},
        "slices": {"type": "array", "items": {"type": "object", "required": ["gpuInstance", "device", "values"],
          "properties": {"gpuInstance": {"type": "integer"}, "device": {"type": "string"}, "profile": {"type": "string"},
            "tenant": {"type": "string"}, "lease": {"type": "integer"}, "values": {"$ref": "#/components/schemas/Values"}}}}}}}}},
"TelemetryHistory": {
  "type": "object", "required": ["gpu", "signal", "unit", "grain", "from", "to", "points"],
  "properties": {"gpu": {"type": "string"}, "slice": {"type": "integer"}, "signal": {"type": "string"}, "unit": {"type": "string"},
    "grain": {"type": "string", "enum": ["second", "minute"]}, "from": {"type": "string", "format": "date-time"}, "to": {"type": "string", "format": "date-time"},
    "points": {"type": "array", "description": "[seconds since 1970, mean, worst]; what was not heard is not there.",
      "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}}}},
"RestRequest": {
  "type": "object", "additionalProperties": false, "required": ["seconds"],
  "properties": {"seconds": {"type": "integer", "minimum": 1, "maximum": 120, "description": "Then it is over by itself, unless asked for again."}}},
"Rest": {
  "type": "object", "required": ["name", "until", "sampler"],
  "properties": {"name": {"type": "string"}, "until": {"type": "string", "format": "date-time"},
    "sampler": {"type": "integer", "description": "The process that rests; 0: it rests no more, or there is none."}}},
"AuditLine": {
  "type": "object", "required": ["id", "at", "user", "verb", "what", "outcome", "hash"],
  "properties": {"id": {"type": "integer"}, "at": {"type": "string", "format": "date-time"}, "user": {"type": "string"}, "role": {"type": "string"},
    "tenant": {"type": "string"}, "from": {"type": "string"}, "verb": {"type": "string"}, "what": {"type": "string"},
    "outcome": {"type": "string"}, "detail": {}, "hash": {"type": "string"}}},
"AuditVerdict": {
  "type": "object", "required": ["lines", "whole"],
  "properties": {"lines": {"type": "integer"}, "whole": {"type": "boolean"}, "broken": {"type": "string"}}},
"Usage": {
  "type": "object", "required": ["from", "to", "by", "unitsOfGpu", "items", "sum"],
  "description": "Exact sums over whole quarters of an hour. A GPU is `unitsOfGpu` units: a compute slice of seven is a seventh of them, a thousandth of a shared GPU a thousandth. Times are microseconds, energy is millijoules; the sum of all items is what passed on the GPUs and what their energy counters said.",
  "properties": {"from": {"type": "string", "format": "date-time"}, "to": {"type": "string", "format": "date-time"},
    "tenant": {"type": "string", "description": "Of this one alone: then without gpus, addsUp and epochs."},
    "by": {"type": "array", "items": {"type": "string"}}, "unitsOfGpu": {"type": "integer"},
    "begins": {"type": "string", "format": "date-time"}, "writtenUntil": {"type": "string", "format": "date-time"},
    "items": {"type": "array", "items": {"type": "object", "required": ["account", "unitMicroseconds"],
      "properties": {"account": {"type": "string", "enum": ["lease", "unallocated", "out-of-service"]},
        "day": {"type": "string"}, "gpu": {"type": "string"}, "tenant": {"type": "string"}, "lease": {"type": "integer"},
        "part": {"type": "integer"}, "user": {"type": "string"}, "label": {"type": "string"}, "generation": {"type": "integer"},
        "class": {"type": "string"}, "profile": {"type": "string"}, "units": {"type": "integer"},
        "sliceMicroseconds": {"type": "integer", "description": "That it had a slice."}, "unitMicroseconds": {"type": "integer"},
        "usedUnitMicroseconds": {"type": "integer"}, "mebibyteMicroseconds": {"type": "integer"},
        "smMicroseconds": {"type": "integer", "description": "Of the whole GPU's SMs."}, "tensorMicroseconds": {"type": "integer"},
        "dramMicroseconds": {"type": "integer"}, "idleMillijoules": {"type": "integer"}, "dynamicMillijoules": {"type": "integer"},
        "errorMillijoules": {"type": "integer", "description": "How far the split of the energy may be off."},
        "blindMicroseconds": {"type": "integer", "description": "Without a reading of its activity."},
        "unmeteredMicroseconds": {"type": "integer", "description": "Without a reading of energy."}}}},
    "sum": {"type": "object"},
    "gpus": {"type": "array", "items": {"type": "object", "required": ["gpu", "microseconds", "counterMillijoules"],
      "properties": {"gpu": {"type": "string"}, "name": {"type": "string"}, "microseconds": {"type": "integer"},
        "counterMillijoules": {"type": "integer"}, "unmeteredMicroseconds": {"type": "integer"}}}},
    "addsUp": {"type": "boolean"},
    "epochs": {"type": "array", "description": "Boots of the host and loads of the driver.", "items": {"type": "object"}}}},
"Page": {
  "type": "object", "required": ["items"],
  "properties": {"items": {"type": "array"}, "next": {"type": "string", "description": "For ?after=; absent on the last page."}}}
})json";

}  // namespace bulkhead::api::v1
